"""The systems that are compared, each with a function that measures it by a runner."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.search_options import EFFORTS
from data_owner_client.evaluation.comparison.knn_lm import KnnLm, build_index, tune_knn
from data_owner_client.evaluation.comparison.results import BEST, CHOSEN_EXAMPLES, PLM, PUBLISHED, SystemResult
from data_owner_client.evaluation.comparison.runner import AS_PUBLISHED, ComparisonRunner, Connect, run_in_subprocess
from data_owner_client.memory.store import TRAIN, ExternalMemory
from data_owner_client.runtime.memory_usage import peak_rss_mb
from data_owner_client.runtime.progress import Reporter
from data_owner_client.training.inputs import Memories, TrainingInput
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.train import TrainingReport
from protocol.errors import InvalidData
from protocol.head import LMHead

PUBLISHED_INTERPOLATION = Interpolation(schedule="gradual", lambda_max=0.9)
_ALONE = Interpolation(schedule="none")
_NO_ADAPTER = {"adapter_bytes": 0, "owner_discloses": 0}
_BEAMS = EFFORTS["medium"][0]


def _plm(runner: ComparisonRunner) -> SystemResult:
    return SystemResult(
        texts=runner.translate_test_set(None), ppl=runner.plm_perplexity(), **_NO_ADAPTER, client_discloses=0
    )


def _plm_with_examples(runner: ComparisonRunner) -> SystemResult:
    adapter = runner.with_retrieved_examples(runner.best[0])
    return SystemResult(
        texts=runner.translate_test_set(adapter, _ALONE),
        ppl=runner.perplexity(adapter, _ALONE),
        details={"nearest": adapter.card.nearest},
        client_discloses=runner.disclosed_bytes("teacher-forced", 0)["client_discloses"],
        **_NO_ADAPTER,
    )


def _published(runner: ComparisonRunner) -> SystemResult:
    return runner.measure_adapter(*runner.published, "teacher-forced", PUBLISHED_INTERPOLATION)


def _constant(runner: ComparisonRunner) -> SystemResult:
    adapter, report = runner.published
    return runner.measure_adapter(adapter, report, "teacher-forced", _likeliest_constant(report))


def _knn_lm(runner: ComparisonRunner) -> SystemResult:
    memory, card = runner.memory("teacher-forced"), runner.published[0].card
    tuned, head, candidate_ids_C = run_in_subprocess(_tune_knn, runner.connect, memory)
    index, label_N = build_index(ExternalMemory(memory / TRAIN), candidate_ids_C)
    knn = KnnLm(card, candidate_ids_C, head, index, label_N, tuned.neighbours, tuned.temperature)
    return SystemResult(
        texts=runner.translate_test_set(knn, tuned.interpolation),
        ppl=runner.perplexity(knn, tuned.interpolation),
        train_seconds=tuned.seconds,
        peak_rss_mb=tuned.peak_rss_mb,
        adapter_bytes=index.ntotal * index.d * 4,
        details={
            "interpolation": tuned.interpolation.model_dump(),
            "neighbours": tuned.neighbours,
            "temperature": tuned.temperature,
        },
        **runner.disclosed_bytes("teacher-forced", len(candidate_ids_C)),
    )


def _residual(runner: ComparisonRunner) -> SystemResult:
    adapter, report = runner.best
    plain = replace(adapter, card=adapter.card.model_copy(update={"nearest": 0}))
    return runner.measure_adapter(plain, report, "teacher-forced", _likeliest_constant(report))


def _without_length_reward(runner: ComparisonRunner) -> SystemResult:
    adapter, report = runner.best
    return runner.measure_adapter(adapter, report, "teacher-forced", adapter.card.interpolation.with_length_reward(0.0))


def _most_probable(runner: ComparisonRunner) -> SystemResult:
    return runner.measure_adapter(*runner.best, "teacher-forced")


def _beams(runner: ComparisonRunner) -> SystemResult:
    return runner.measure_adapter(*runner.best, "teacher-forced", beams=_BEAMS)


def _best(runner: ComparisonRunner) -> SystemResult:
    return runner.measure_adapter(*runner.best, "teacher-forced", consensus=runner.consensus)


def _private(runner: ComparisonRunner) -> SystemResult:
    adapter, report = runner.trained("private", "private", _private_settings(runner))
    return runner.measure_adapter(adapter, report, "private", consensus=runner.consensus)


def _private_by_position(runner: ComparisonRunner) -> SystemResult:
    settings = replace(_private_settings(runner), pairing="by_position", form="residual")
    adapter, report = runner.trained("private_by_position", "private", settings)
    return runner.measure_adapter(adapter, report, "private", consensus=runner.consensus)


def _private_settings(runner: ComparisonRunner) -> TrainingSettings:
    """The settings without retrieved examples, which would show the targets."""
    return replace(runner.settings, retrieved_examples=0)


@dataclass(frozen=True)
class System:
    """A system that `compare` measures.

    Attributes:
        what: description for tables.
        measure: measures it with a runner.
        fixed_settings: the training settings of the call do not change it.
        same_for_labels: name of the system that it equals where answers are labels, whose length is not rewarded;
            empty for a system of its own.
        same_without_draws: name of the system that it equals without a consensus; empty for a system of its own.
        needs_free_texts: it cannot answer with labels, or with texts that are held to a form.
    """

    what: str
    measure: Callable[[ComparisonRunner], SystemResult]
    fixed_settings: bool = False
    same_for_labels: str = ""
    same_without_draws: str = ""
    needs_free_texts: bool = False

    def unfit_for(self, task: Task, draws: int) -> str:
        """Why it is not measured on a task, behind its name; empty where it is.

        Args:
            task: the task.
            draws: texts drawn for each source for a consensus; 0 for none.
        """
        if self.needs_free_texts and task.kind in ("classify", "extract"):
            return f"needs free texts, and a task of the kind {task.kind} has none"
        same = self.same_for_labels if task.kind == "classify" else ""
        same = same or ("" if draws else self.same_without_draws)
        return f"is the same as {same}" if same else ""


SYSTEMS: dict[str, System] = {
    PLM: System("the PLM alone, with the task's own examples", _plm, fixed_settings=True),
    CHOSEN_EXAMPLES: System("the PLM alone, with examples chosen for each text", _plm_with_examples),
    PUBLISHED: System("PEMA as published: paper's form, Gradual Unrolling, λ_max 0.9", _published, fixed_settings=True),
    "constant": System("the same adapter with the likeliest constant λ", _constant, fixed_settings=True),
    "knn_lm": System("kNN-LM on the same memory, k, temperature and λ tuned", _knn_lm, fixed_settings=True),
    "residual": System("our adapter with the likeliest constant λ, no examples chosen for each text", _residual),
    "without_length_reward": System(
        "all that training chose but for the length reward", _without_length_reward, same_for_labels=BEST
    ),
    "most_probable": System(
        "all that training chose, the most probable tokens", _most_probable, same_without_draws=BEST
    ),
    "beams": System(f"all that training chose, {_BEAMS} beams", _beams, needs_free_texts=True),
    BEST: System("all that training chose", _best),
    "private": System("the same on a private memory, contexts aligned", _private),
    "private_by_position": System("a private memory paired as the paper draws it", _private_by_position),
}
"""Systems that `compare` measures, by name."""


def systems_for(task: Task, only: Sequence[str], consensus: int, reporter: Reporter) -> dict[str, System]:
    """The systems to measure on a task, by name. The reporter says which are left out, as they equal others.

    Args:
        task: the task.
        only: names of the systems to measure; empty for all.
        consensus: texts drawn for each source for a consensus; 0 for none.
        reporter: receives the names that are left out.

    Raises:
        InvalidData: a name is not that of a system, or its system equals another one here or cannot do the task.
    """
    draws = draws_for(task, consensus)
    unfit = {name: why for name, system in SYSTEMS.items() if (why := system.unfit_for(task, draws))}
    for name in only:
        if name not in SYSTEMS:
            raise InvalidData(f"There is no system {name}.", hint=f"There are {', '.join(SYSTEMS)}.")
        if name in unfit:
            others = (other for other in SYSTEMS if other not in unfit)
            raise InvalidData(f"{name} {unfit[name]}.", hint=f"Use --only with {', '.join(others)}.")
    if not only and unfit:
        reporter.say(f"Left out: {'; '.join(f'{name} {why}' for name, why in unfit.items())}.")
    best = replace(SYSTEMS[BEST], what=f"{SYSTEMS[BEST].what}, consensus of {draws} draws")
    systems = SYSTEMS | ({BEST: best} if draws else {})
    return {name: system for name, system in systems.items() if name not in unfit and (not only or name in only)}


def draws_for(task: Task, consensus: int) -> int:
    """Texts drawn for each source; none where answers are labels."""
    return 0 if task.kind == "classify" else consensus


@dataclass(frozen=True)
class _TunedKnn:
    neighbours: int
    temperature: float
    interpolation: Interpolation
    seconds: float
    peak_rss_mb: float


def _tune_knn(connect: Connect, memory: Path) -> tuple[_TunedKnn, LMHead, Tensor]:
    started = time.perf_counter()
    with connect() as plm:
        memories = Memories.open(memory, plm)
        inputs = TrainingInput.from_memories(plm, memories, AS_PUBLISHED, Reporter())
    index, label_N = build_index(memories.train, inputs.stats.candidate_ids_C)
    neighbours, temperature, logprob_N = tune_knn(index, label_N, inputs.validation)
    interpolation, _ = inputs.validation.best(logprob_N, "constant")
    tuned = _TunedKnn(neighbours, temperature, interpolation, time.perf_counter() - started, peak_rss_mb())
    return tuned, inputs.targets.candidates, inputs.stats.candidate_ids_C


def _likeliest_constant(report: TrainingReport) -> Interpolation:
    """The likeliest constant λ for prompts with the task's examples."""
    policies = [
        policy
        for policy in report.options
        if policy.nearest == 0 and policy.interpolation.schedule == "constant" and policy.interpolation.gate is None
    ]
    return min(policies, key=lambda policy: policy.nll).interpolation.with_length_reward(0.0)

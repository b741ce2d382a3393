"""The systems that are compared, and how each of them is made on a bench."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.evaluation.comparison.knn_lm import KnnLm, build_index, tune
from data_owner_client.evaluation.comparison.results import BEST, PLM, PUBLISHED, SystemResult
from data_owner_client.evaluation.comparison.runner import AS_PUBLISHED, ComparisonRunner, Connect, run_in_subprocess
from data_owner_client.memory.store import TRAIN, ExternalMemory
from data_owner_client.runtime.memory_usage import peak_rss_mb
from data_owner_client.runtime.progress import Reporter
from data_owner_client.training.inputs import Memories, TrainingInput
from data_owner_client.training.train import TrainingReport
from protocol.head import LMHead

PUBLISHED_INTERPOLATION = Interpolation(schedule="gradual", lambda_max=0.9)
# Texts drawn for each by our best.
CONSENSUS = 8
_ALONE = Interpolation(schedule="none")
_NO_ADAPTER = {"adapter_bytes": 0, "owner_discloses": 0}


def _plm(bench: ComparisonRunner) -> SystemResult:
    return SystemResult(texts=bench.answer(None), ppl=bench.plm_perplexity(), **_NO_ADAPTER, client_discloses=0)


def _plm_with_examples(bench: ComparisonRunner) -> SystemResult:
    adapter = bench.with_examples(bench.best[0])
    return SystemResult(
        texts=bench.answer(adapter, _ALONE),
        ppl=bench.perplexity(adapter, _ALONE),
        details={"nearest": adapter.card.nearest},
        client_discloses=bench.disclosed("teacher-forced", 0)["client_discloses"],
        **_NO_ADAPTER,
    )


def _published(bench: ComparisonRunner) -> SystemResult:
    return bench.adapted(*bench.published, "teacher-forced", PUBLISHED_INTERPOLATION)


def _constant(bench: ComparisonRunner) -> SystemResult:
    adapter, report = bench.published
    return bench.adapted(adapter, report, "teacher-forced", _likeliest_constant(report))


def _knn_lm(bench: ComparisonRunner) -> SystemResult:
    memory, card = bench.memory("teacher-forced"), bench.published[0].card
    tuned, head, candidate_ids_C = run_in_subprocess(_tune_knn, bench.connect, memory)
    index, label_N = build_index(ExternalMemory(memory / TRAIN), candidate_ids_C)
    used = tuned.interpolation
    knn = KnnLm(card, candidate_ids_C, head, index, label_N, tuned.neighbours, tuned.temperature)
    return SystemResult(
        texts=bench.answer(knn, used),
        ppl=bench.perplexity(knn, used),
        train_seconds=tuned.seconds,
        peak_rss_mb=tuned.peak_rss_mb,
        adapter_bytes=index.ntotal * index.d * 4,
        details={
            "interpolation": used.model_dump(),
            "neighbours": tuned.neighbours,
            "temperature": tuned.temperature,
        },
        **bench.disclosed("teacher-forced", len(candidate_ids_C)),
    )


def _residual(bench: ComparisonRunner) -> SystemResult:
    adapter, report = bench.best
    plain = replace(adapter, card=adapter.card.model_copy(update={"nearest": 0}))
    return bench.adapted(plain, report, "teacher-forced", _likeliest_constant(report))


def _without_length_reward(bench: ComparisonRunner) -> SystemResult:
    adapter, report = bench.best
    return bench.adapted(adapter, report, "teacher-forced", adapter.card.interpolation.with_length_reward(0.0))


def _most_probable(bench: ComparisonRunner) -> SystemResult:
    return bench.adapted(*bench.best, "teacher-forced")


def _best(bench: ComparisonRunner) -> SystemResult:
    return bench.adapted(*bench.best, "teacher-forced", consensus=CONSENSUS)


def _private(bench: ComparisonRunner) -> SystemResult:
    adapter, report = bench.trained("private", "private", bench.settings)
    return bench.adapted(adapter, report, "private", consensus=CONSENSUS)


def _private_by_position(bench: ComparisonRunner) -> SystemResult:
    settings = replace(bench.settings, pairing="by_position", form="residual")
    adapter, report = bench.trained("private_by_position", "private", settings)
    return bench.adapted(adapter, report, "private", consensus=CONSENSUS)


SYSTEMS: dict[str, tuple[str, Callable[[ComparisonRunner], SystemResult]]] = {
    PLM: ("the PLM alone, with the task's own examples", _plm),
    "plm_nearest": ("the PLM alone, with examples chosen for each text", _plm_with_examples),
    PUBLISHED: ("PEMA as published: paper's form, Gradual Unrolling, λ_max 0.9", _published),
    "constant": ("the same adapter with the likeliest constant λ", _constant),
    "knn_lm": ("kNN-LM on the same memory, k, temperature and λ tuned", _knn_lm),
    "residual": ("our adapter with the likeliest constant λ, no examples chosen for each text", _residual),
    "without_length_reward": ("all that training chose but for the length reward", _without_length_reward),
    "most_probable": ("all that training chose, the most probable tokens", _most_probable),
    BEST: (f"all that training chose, consensus of {CONSENSUS} draws", _best),
    "private": ("the same on a private memory, contexts aligned", _private),
    "private_by_position": ("a private memory paired as the paper draws it", _private_by_position),
}
"""What `compare` measures: each system in words, and how."""


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
        given = TrainingInput.of(plm, memories, AS_PUBLISHED, Reporter())
    index, label_N = build_index(memories.train, given.survey.candidate_ids_C)
    neighbours, temperature, logprob_N = tune(index, label_N, given.validation)
    interpolation, _ = given.validation.best(logprob_N, "constant")
    tuned = _TunedKnn(neighbours, temperature, interpolation, time.perf_counter() - started, peak_rss_mb())
    return tuned, given.targets.candidates, given.survey.candidate_ids_C


def _likeliest_constant(report: TrainingReport) -> Interpolation:
    """Of the PLM with the task's own prompt."""
    constant = [
        option
        for option in report.options
        if option.nearest == 0 and option.interpolation.schedule == "constant" and option.interpolation.gate is None
    ]
    return min(constant, key=lambda option: option.nll).interpolation.with_length_reward(0.0)

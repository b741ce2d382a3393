"""The comparison: memories built, rivals trained, each in a process of its own, the test set translated by all."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from data_owner_client.adapter import Adaptation, TrainedAdapter
from data_owner_client.candidates import token_set
from data_owner_client.comparison.knn_lm import KnnLm, build_index, tune
from data_owner_client.comparison.rows import BEST, PLM, PUBLISHED, RESAMPLES, Measured, Row, side_by_side
from data_owner_client.data import Pair, digest_pairs
from data_owner_client.decoding.interpolation import Interpolation
from data_owner_client.evaluation import perplexities, plm_target_logprobs, text_scores
from data_owner_client.fitting import NEAREST, REPORT, Targets, TrainingReport
from data_owner_client.generation import translate
from data_owner_client.memory import ExternalMemory, MemoryRows
from data_owner_client.memory.build import encode_all, tokenize_pair
from data_owner_client.memory.store import TRAIN, VALIDATION, ContextMode
from data_owner_client.nearest import with_examples
from data_owner_client.peak_memory import peak_rss_mb
from data_owner_client.plm import RemotePlm
from data_owner_client.progress import Reporter, RichReporter
from data_owner_client.tasks import Task
from data_owner_client.training import Survey, TrainingSettings, ValidationData
from data_owner_client.verbs import build_memories, train
from protocol.errors import InvalidData
from protocol.head import LMHead

Connect = Callable[[], RemotePlm]
"""Opens a connection; travels to other processes."""

_T = TypeVar("_T")

# Section 4 of the paper.
AS_PUBLISHED = TrainingSettings(
    form="paper",
    rank=512,
    kappa=0.2,
    learning_rate=1e-3,
    dropout=0.2,
    pairing="position",
    nearest=0,
    gate=False,
    decoded=0,
)
PUBLISHED_INTERPOLATION = Interpolation(schedule="gradual", lambda_max=0.9)
_ALONE = Interpolation(schedule="none")


@dataclass(frozen=True)
class Splits:
    """The pairs of a task."""

    train: Sequence[Pair]
    validation: Sequence[Pair]
    test: Sequence[Pair]


class Comparison(BaseModel):
    """All systems on one test set."""

    task: str
    model: str
    pairs: dict[str, int]
    signatures: list[str]
    rows: list[Row]


def compare(
    connect: Connect,
    task: Task,
    splits: Splits,
    folder: Path,
    *,
    only: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> Comparison:
    """Build, train and evaluate what is not there yet; then put all side by side.

    Interrupted, the same call goes on where it was. Rows of other systems, such as the benchmark's LoRA, are taken from
    `folder/rows`.

    Args:
        connect: opens a connection to the server.
        task: of all systems.
        splits: its pairs. The targets of all of them are shown to the PLM's owner, for perplexities and teacher-forced
            contexts.
        folder: for memories, adapters and rows.
        only: names of systems to measure; all unless given.
        reporter: told of the progress.

    Raises:
        InvalidData: a name is none of a system, or a file is damaged.
        PemaError: as building, training and translating.
    """
    reporter = reporter or Reporter()
    with connect() as plm:
        bench = _Bench(connect, plm, task, splits, folder, reporter)
        unknown = set(only) - set(_SYSTEMS)
        if unknown:
            raise InvalidData(f"There is no system {min(unknown)}.", hint=f"There are {', '.join(SYSTEMS)}.")
        for name, (what, measure) in _SYSTEMS.items():
            if not only or name in only:
                bench.measure(name, what, measure)
        measured = Measured.load_all(folder / "rows")
        order = {name: number for number, name in enumerate(_SYSTEMS)}
        rows = side_by_side(
            sorted(measured.values(), key=lambda one: order.get(one.name, len(order))),
            [pair.target or "" for pair in splits.test],
        )
        sizes = {name: len(part) for name, part in vars(splits).items()}
        scores = text_scores(["a"], ["a"])
        signatures = [f"{one}|bs:{RESAMPLES}" for one in (scores.bleu_signature, scores.chrf_signature)]
        return Comparison(task=task.name, model=plm.card.name, pairs=sizes, signatures=signatures, rows=rows)


class _Bench:
    """What the systems share: the server, the data, the memories, the adapters trained so far."""

    def __init__(
        self, connect: Connect, plm: RemotePlm, task: Task, splits: Splits, folder: Path, reporter: Reporter
    ) -> None:
        self.connect = connect
        self._plm = plm
        self._task = task
        self._splits = splits
        self._folder = folder
        self._reporter = reporter
        digests = [digest_pairs(part) for part in vars(splits).values()]
        record = json.dumps([plm.card.digest, task.model_dump(), digests], sort_keys=True)
        self._identity = hashlib.sha256(record.encode()).hexdigest()

    def measure(self, name: str, what: str, system: Callable[[_Bench], Measured]) -> None:
        """Measure a system and keep its row, unless that is there."""
        kept = Measured.load_all(self._folder / "rows").get(name)
        if kept is None or kept.identity != self._identity:
            self._reporter.say(f"{name}: {what}.")
            row = system(self).model_copy(update={"name": name, "what": what, "identity": self._identity})
            row.save(self._folder / "rows")

    def memory(self, mode: ContextMode) -> Path:
        """The memories of a context mode."""
        folder = self._folder / f"memory-{mode}"
        build_memories(
            self._plm,
            self._task,
            self._splits.train,
            folder,
            validation=self._splits.validation,
            context_mode=mode,
            share_targets=mode == "teacher-forced",
            reporter=self._reporter,
        )
        return folder

    def trained(
        self, name: str, mode: ContextMode, settings: TrainingSettings
    ) -> tuple[TrainedAdapter, TrainingReport]:
        """An adapter, trained in a process of its own so that its memory can be measured."""
        memory, folder = self.memory(mode), self._folder / f"adapter-{name}"
        digest = ExternalMemory(memory / TRAIN).digest
        report = _report(folder)
        wanted = {k: v for k, v in asdict(settings).items() if v is not None or k != "form"}
        if report is None or report.card.memory_digest != digest or not wanted.items() <= report.card.settings.items():
            _in_own_process(_train, self.connect, memory, folder, settings)
            report = TrainingReport.model_validate_json((folder / REPORT).read_bytes())
        return TrainedAdapter.load(folder), report

    @cached_property
    def published(self) -> tuple[TrainedAdapter, TrainingReport]:
        """PEMA as published."""
        return self.trained(PUBLISHED, "teacher-forced", AS_PUBLISHED)

    @cached_property
    def best(self) -> tuple[TrainedAdapter, TrainingReport]:
        """What training chooses by itself."""
        return self.trained(BEST, "teacher-forced", TrainingSettings())

    def with_examples(self, adapter: TrainedAdapter) -> TrainedAdapter:
        """The adapter, with prompts for the PLM that have examples of their own."""
        card = adapter.card.model_copy(update={"nearest": adapter.card.nearest or NEAREST})
        return replace(adapter, card=card, pairs=list(self._splits.train))

    def answer(self, adapter: Adaptation | None, interpolation: Interpolation | None = None) -> list[str]:
        """The texts of the test set."""
        sources = [pair.source for pair in self._splits.test]
        return translate(
            self._plm,
            sources,
            adapter=adapter,
            task=self._task,
            interpolation=interpolation or (adapter.card.interpolation if adapter else None),
            reporter=self._reporter,
        ).texts

    def perplexity(self, adapter: Adaptation, interpolation: Interpolation) -> float:
        """Of the test set's targets."""
        rows = [self._rows] if adapter.nearest is None else [self._rows, self._rows_with_examples(adapter)]
        return perplexities(self._plm, adapter, rows[0], interpolation, *rows[1:]).mixture

    def adapted(
        self,
        adapter: TrainedAdapter,
        report: TrainingReport,
        mode: ContextMode,
        interpolation: Interpolation | None = None,
    ) -> Measured:
        """The row of a trained adapter."""
        used = interpolation or adapter.card.interpolation
        files = Path(report.folder).glob("[!.]*")
        return Measured(
            name="",
            texts=self.answer(adapter, used),
            ppl=self.perplexity(adapter, used),
            train_seconds=report.seconds,
            peak_rss_mb=report.peak_rss_mb,
            adapter_bytes=sum(path.stat().st_size for path in files if path.suffix != ".png"),
            details={"interpolation": used.model_dump(), "form": adapter.card.form, "nearest": adapter.card.nearest},
            **self.disclosed(mode, len(adapter.candidate_ids_C)),
        )

    def disclosed(self, mode: ContextMode, candidates: int) -> dict[str, int]:
        """Bytes that each side shows the other to build memories and train."""
        pairs = [*self._splits.train, *self._splits.validation]
        texts = [pair.source for pair in pairs]
        texts += [pair.target or "" for pair in pairs] if mode == "teacher-forced" else []
        memories = [ExternalMemory(self.memory(mode) / part) for part in (TRAIN, VALIDATION)]
        rows = sum(memory.manifest.rows for memory in memories)
        width = self._plm.card.hidden_size
        wire = {"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1}[self._plm.dtype]
        return {
            "client_discloses": sum(len(text.encode()) for text in texts),
            "owner_discloses": rows * width * wire + candidates * width * 4,
        }

    def plm_perplexity(self) -> float:
        """Of the PLM alone."""
        ids_K = token_set([self._rows.target_N])
        return math.exp(-plm_target_logprobs(self._plm.head_rows(ids_K), ids_K, self._rows).mean().item())

    @cached_property
    def _rows(self) -> MemoryRows:
        return self._encoded([self._task] * len(self._splits.test))

    def _rows_with_examples(self, adapter: Adaptation) -> MemoryRows:
        sources = [pair.source for pair in self._splits.test]
        examples = adapter.nearest.examples(sources) if adapter.nearest else []
        return self._encoded(
            [with_examples(self._plm, self._task, *each) for each in zip(sources, examples, strict=True)]
        )

    def _encoded(self, tasks: Sequence[Task]) -> MemoryRows:
        pairs = [
            tokenize_pair(self._plm, task, pair, place=f"test pair {number}")
            for number, (task, pair) in enumerate(zip(tasks, self._splits.test, strict=True), 1)
        ]
        return encode_all(self._plm, pairs, self._reporter)


def _measure_plm(bench: _Bench) -> Measured:
    return Measured(name="", texts=bench.answer(None), ppl=bench.plm_perplexity())


def _measure_plm_with_examples(bench: _Bench) -> Measured:
    adapter = bench.with_examples(bench.best[0])
    return Measured(
        name="",
        texts=bench.answer(adapter, _ALONE),
        ppl=bench.perplexity(adapter, _ALONE),
        details={"nearest": adapter.card.nearest},
        client_discloses=bench.disclosed("teacher-forced", 0)["client_discloses"],
    )


def _measure_published(bench: _Bench) -> Measured:
    return bench.adapted(*bench.published, "teacher-forced", PUBLISHED_INTERPOLATION)


def _measure_constant(bench: _Bench) -> Measured:
    adapter, report = bench.published
    return bench.adapted(adapter, report, "teacher-forced", _likeliest_constant(report))


def _measure_knn_lm(bench: _Bench) -> Measured:
    memory, card = bench.memory("teacher-forced"), bench.published[0].card
    tuned, head, candidate_ids_C = _in_own_process(_tune_knn, bench.connect, memory)
    index, label_N = build_index(ExternalMemory(memory / TRAIN), candidate_ids_C)
    used = tuned.interpolation
    knn = KnnLm(card, candidate_ids_C, head, index, label_N, tuned.neighbours, tuned.temperature)
    return Measured(
        name="",
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


def _measure_residual(bench: _Bench) -> Measured:
    adapter, report = bench.best
    plain = replace(adapter, card=adapter.card.model_copy(update={"nearest": 0}))
    return bench.adapted(plain, report, "teacher-forced", _likeliest_constant(report))


def _measure_best(bench: _Bench) -> Measured:
    return bench.adapted(*bench.best, "teacher-forced")


def _measure_private(bench: _Bench) -> Measured:
    return bench.adapted(*bench.trained("private", "private", TrainingSettings()), "private")


def _measure_private_by_position(bench: _Bench) -> Measured:
    settings = TrainingSettings(pairing="position", form="residual")
    return bench.adapted(*bench.trained("private_by_position", "private", settings), "private")


_SYSTEMS: dict[str, tuple[str, Callable[[_Bench], Measured]]] = {
    PLM: ("the PLM alone, with the task's own examples", _measure_plm),
    "plm_nearest": ("the PLM alone, with examples chosen for each text", _measure_plm_with_examples),
    PUBLISHED: ("PEMA as published: paper's form, Gradual Unrolling, λ_max 0.9", _measure_published),
    "constant": ("the same adapter with the likeliest constant λ", _measure_constant),
    "knn_lm": ("kNN-LM on the same memory, k, temperature and λ tuned", _measure_knn_lm),
    "residual": ("our adapter, without examples chosen for each text", _measure_residual),
    BEST: ("all that training chose by itself", _measure_best),
    "private": ("the same on a private memory: contexts aligned, recent tokens seen", _measure_private),
    "private_by_position": ("a private memory paired as the paper draws it", _measure_private_by_position),
}
SYSTEMS = tuple(_SYSTEMS)
"""Names of the systems that `compare` measures itself."""


@dataclass(frozen=True)
class _TunedKnn:
    neighbours: int
    temperature: float
    interpolation: Interpolation
    seconds: float
    peak_rss_mb: float


def _tune_knn(connect: Connect, memory: Path) -> tuple[_TunedKnn, LMHead, Tensor]:
    started = time.perf_counter()
    train_memory, held_out = ExternalMemory(memory / TRAIN), ExternalMemory(memory / VALIDATION)
    candidate_ids_C = Survey.of(train_memory).candidate_ids_C
    with connect() as plm:
        targets = Targets.fetch(plm, candidate_ids_C, held_out, Reporter())
    rows = held_out.load()
    validation = ValidationData.of(rows, candidate_ids_C, targets.plm_logprobs(rows), train_memory.length_ratio)
    index, label_N = build_index(train_memory, candidate_ids_C)
    neighbours, temperature, logprob_N = tune(index, label_N, validation)
    interpolation, _ = validation.best(logprob_N, "constant")
    tuned = _TunedKnn(neighbours, temperature, interpolation, time.perf_counter() - started, peak_rss_mb())
    return tuned, targets.candidates, candidate_ids_C


def _train(connect: Connect, memory: Path, folder: Path, settings: TrainingSettings) -> None:
    with connect() as plm:
        train(plm, memory, folder, settings=settings, reporter=RichReporter())


def _in_own_process(work: Callable[..., _T], *arguments: Any) -> _T:
    """What `work` gives in a process of its own, so that its memory can be measured."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        1, mp_context=spawn, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
    ) as process:
        return process.submit(work, *arguments).result()


def _report(folder: Path) -> TrainingReport | None:
    """What was trained in a folder; None if nothing was, or not to the end."""
    try:
        return TrainingReport.model_validate_json((folder / REPORT).read_bytes())
    except (OSError, ValidationError):
        return None


def _likeliest_constant(report: TrainingReport) -> Interpolation:
    """Of the PLM with the task's own prompt."""
    constant = [
        option
        for option in report.options
        if option.nearest == 0 and option.interpolation.schedule == "constant" and option.interpolation.gate is None
    ]
    return min(constant, key=lambda option: option.nll).interpolation

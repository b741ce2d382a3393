"""Steps that the systems of a comparison share: memories, trainings, translation and perplexity of the test set."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from pydantic import ValidationError

from data_owner_client.adapter.candidates import token_set
from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.data.example_retrieval import ExampleRetriever, with_retrieved_examples
from data_owner_client.data.pairs import Pair, Source, digest_pairs, texts_of
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.generation import translate
from data_owner_client.decoding.settings import LABELS_ALONE_TOLERANCE, DecodingSettings
from data_owner_client.evaluation.comparison.results import BEST, PUBLISHED, SystemResult
from data_owner_client.evaluation.perplexity import perplexities
from data_owner_client.memory.build_splits import build_memories, task_of_memory
from data_owner_client.memory.encode import encode_all
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.memory.store import TRAIN, VALIDATION, ExternalMemory
from data_owner_client.memory.tokenized_pairs import tokenize_pairs
from data_owner_client.memory.types import ContextMode
from data_owner_client.plm.head_recovery.fit import contexts_needed
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter
from data_owner_client.runtime.progress_display import stderr_reporter
from data_owner_client.training.decoding_policy import DEFAULT_RETRIEVED_EXAMPLES
from data_owner_client.training.inputs import resolve_settings
from data_owner_client.training.likelihood import plm_target_logprobs
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.train import REPORT, TrainingReport, train
from protocol import standard_streams
from protocol.messages import DTYPES

Connect = Callable[[], RemotePlm]
"""Opens a connection; must be picklable, as other processes call it, too."""

_T = TypeVar("_T")

# Section 4 of the paper, but along the memory's principal axes, as everything is trained here.
AS_PUBLISHED = TrainingSettings(
    form="paper",
    rank=512,
    kappa=0.2,
    learning_rate=1e-3,
    dropout=0.2,
    ema_decay=0.0,
    pairing="by_position",
    retrieved_examples=0,
    gate=False,
    selection_texts=0,
    minutes=0,
)
# LM-head rows and distributions always travel as float32.
_HEAD_BYTES = 4


@dataclass(frozen=True)
class Splits:
    """Pairs of a task: to train on, to validate on, and to test on."""

    train: Sequence[Pair]
    validation: Sequence[Pair]
    test: Sequence[Pair]


class ComparisonRunner:
    """Builds memories, trains adapters and translates for the systems; nothing is done twice.

    Args:
        connect: opens further connections.
        plm: the PLM.
        task: task of all systems, from `comparison_task`.
        splits: pairs of the task.
        folder: folder for memories, adapters and rows.
        settings: training settings of PEMA's own systems.
        consensus: texts drawn for each source for a consensus; 0 for none.
        reporter: shows the progress.
    """

    def __init__(
        self,
        connect: Connect,
        plm: RemotePlm,
        task: Task,
        splits: Splits,
        folder: Path,
        settings: TrainingSettings,
        consensus: int,
        reporter: Reporter,
    ) -> None:
        self.connect = connect
        self._plm = plm
        self.task = task
        self._splits = splits
        self._folder = folder
        self.settings = settings
        self.consensus = consensus
        self._reporter = reporter
        digests = [digest_pairs(part) for part in vars(splits).values()]
        self._data_identity = [plm.card.digest, self.task.model_dump(mode="json"), digests]
        # Made once for all systems.
        self.memory = cache(self._memory)
        self._rows = cache(self._encoded)

    def measure(
        self, name: str, what: str, system: Callable[[ComparisonRunner], SystemResult], *, fixed_settings: bool
    ) -> None:
        """Measure a system and store its result, unless it is stored already.

        Args:
            name: name of the system.
            what: description of the system.
            system: measures it.
            fixed_settings: the settings of the call do not change it.
        """
        record = [*self._data_identity, *([] if fixed_settings else [asdict(self.settings), self.consensus])]
        identity = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
        stored = SystemResult.load(self._folder / "rows", name)
        if stored is None or stored.identity != identity:
            self._reporter.say(f"{name}: {what}.")
            result = system(self).model_copy(update={"name": name, "what": what, "identity": identity})
            result.save(self._folder / "rows")

    def _memory(self, mode: ContextMode) -> Path:
        """Build the memories of a context mode; return their folder."""
        folder = _memory_folder(self._folder, mode)
        build_memories(
            self._plm,
            self.task,
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
        """An adapter and its report, trained in a separate process so that its memory use can be measured."""
        memory, folder = self.memory(mode), self._folder / f"adapter-{name}"
        train_memory, report = ExternalMemory(memory / TRAIN), _report(folder)
        first_trial = asdict(resolve_settings(settings, train_memory.manifest.plan)[0])
        if (
            report is None
            or report.card.memory_digest != train_memory.digest
            or report.trials[0].settings != first_trial
        ):
            run_in_subprocess(_train, self.connect, memory, folder, settings)
            report = _read_report(folder)
        return TrainedAdapter.load(folder), report

    @cached_property
    def published(self) -> tuple[TrainedAdapter, TrainingReport]:
        """The adapter and report of PEMA as published."""
        return self.trained(PUBLISHED, "teacher-forced", AS_PUBLISHED)

    @cached_property
    def best(self) -> tuple[TrainedAdapter, TrainingReport]:
        """The adapter and report of PEMA with the settings that training chooses."""
        return self.trained(BEST, "teacher-forced", self.settings)

    def with_retrieved_examples(self, adapter: TrainedAdapter) -> TrainedAdapter:
        """The adapter with retrieved examples in the PLM's prompts."""
        card = adapter.card.model_copy(update={"nearest": adapter.card.nearest or DEFAULT_RETRIEVED_EXAMPLES})
        return replace(adapter, card=card, pairs=list(self._splits.train))

    def translate_test_set(
        self,
        adapter: CandidateDistribution | None,
        interpolation: Interpolation | None = None,
        *,
        consensus: int = 0,
        beams: int = 1,
    ) -> list[str]:
        """Texts of a system for the test set."""
        return translate(
            self._plm,
            self._test_sources,
            adapter=adapter,
            task=self.task,
            interpolation=interpolation,
            decoding=DecodingSettings(label_tolerance=LABELS_ALONE_TOLERANCE),
            consensus=consensus,
            beams=beams,
            reporter=self._reporter,
        ).texts

    def perplexity(self, adapter: CandidateDistribution, interpolation: Interpolation) -> float:
        """Perplexity of the test set's targets under the mixture."""
        rows = [self._rows(0)]
        if adapter.retriever is not None:
            rows.append(self._rows(adapter.card.nearest))
        return perplexities(self._plm, adapter, rows[0], interpolation, *rows[1:]).mixture

    def plm_perplexity(self) -> float:
        """Perplexity of the test set's targets under the PLM alone."""
        rows = self._rows(0)
        ids_K = token_set([rows.target_N])
        return math.exp(-plm_target_logprobs(self._plm.head_rows(ids_K), ids_K, rows).mean().item())

    def measure_adapter(
        self,
        adapter: TrainedAdapter,
        report: TrainingReport,
        mode: ContextMode,
        interpolation: Interpolation | None = None,
        *,
        consensus: int = 0,
        beams: int = 1,
    ) -> SystemResult:
        """Result of a trained adapter; without an interpolation, with that of its card."""
        interpolation = interpolation or adapter.card.interpolation
        files = Path(report.folder).glob("[!.]*")
        return SystemResult(
            texts=self.translate_test_set(adapter, interpolation, consensus=consensus, beams=beams),
            ppl=self.perplexity(adapter, interpolation),
            train_seconds=report.seconds,
            peak_rss_mb=report.peak_rss_mb,
            adapter_bytes=sum(path.stat().st_size for path in files if path.suffix != ".png"),
            details={
                "interpolation": interpolation.model_dump(),
                "form": adapter.card.form,
                "pairing": adapter.card.settings["pairing"],
                "nearest": adapter.card.nearest,
                "consensus": consensus,
                "beams": beams,
            },
            **self.disclosed_bytes(mode, len(adapter.candidate_ids_C)),
        )

    def disclosed_bytes(self, mode: ContextMode, candidates: int) -> dict[str, int]:
        """Bytes that each side shows the other side to build memories and train."""
        pairs = [*self._splits.train, *self._splits.validation]
        texts = [text for pair in pairs for text in texts_of(pair.question)]
        texts += [pair.target or "" for pair in pairs] if mode == "teacher-forced" else []
        memories = [ExternalMemory(self.memory(mode) / part) for part in (TRAIN, VALIDATION)]
        rows = sum(memory.manifest.rows for memory in memories)
        card = self._plm.card
        # An owner that gives no LM-head rows is asked for full distributions.
        head = contexts_needed(card) * card.vocab_size if card.head_policy == "none" else candidates * card.hidden_size
        return {
            "client_discloses": sum(len(text.encode()) for text in texts),
            "owner_discloses": rows * card.hidden_size * DTYPES[self._plm.dtype].itemsize + head * _HEAD_BYTES,
        }

    @property
    def _test_sources(self) -> list[Source]:
        return [pair.question for pair in self._splits.test]

    def _encoded(self, count: int) -> MemoryRows:
        """Rows of the test set behind prompts with `count` retrieved examples, or the task's examples for 0."""
        retriever = ExampleRetriever(self._splits.train, count) if count else None
        tasks = with_retrieved_examples(self._plm, self.task, self._test_sources, retriever)
        pairs = tokenize_pairs(self._plm, tasks, self._splits.test, label="test pair")
        return encode_all(self._plm, pairs, self._reporter)


def comparison_task(task: Task, plm: RemotePlm, splits: Splits, folder: Path) -> Task:
    """The task with all that is fixed when memories are begun, such as its labels; see `task_of_memory`."""
    folders = [_memory_folder(folder, mode) / TRAIN for mode in get_args(ContextMode)]
    return task_of_memory(task, plm.tokenizer, [splits.train, splits.validation], *folders)


def _memory_folder(folder: Path, mode: ContextMode) -> Path:
    return folder / f"memory-{mode}"


def run_in_subprocess(work: Callable[..., _T], *arguments: Any) -> _T:
    """Run a function in a separate process, so that its memory use can be measured; return its result."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_begin, initargs=(torch.get_num_threads(),)) as process:
        return process.submit(work, *arguments).result()


def _begin(threads: int) -> None:
    standard_streams.use_utf8()
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Stop when the waiting process is killed, so as not to disturb its next run."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
    os._exit(1)


def _train(connect: Connect, memory: Path, folder: Path, settings: TrainingSettings) -> None:
    with connect() as plm:
        train(plm, memory, folder, settings=settings, reporter=stderr_reporter())


def _report(folder: Path) -> TrainingReport | None:
    """The report of a folder's training; None if no training has ended there."""
    try:
        return _read_report(folder)
    except (OSError, ValidationError):
        return None


def _read_report(folder: Path) -> TrainingReport:
    # Where it lies now: it may have been moved, and JSON holds no path with bytes that are not UTF-8.
    report = TrainingReport.model_validate_json((folder / REPORT).read_bytes())
    return report.model_copy(update={"folder": str(folder)})

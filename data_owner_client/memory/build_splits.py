"""Build the memories of the training pairs and the held-out pairs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import date
from itertools import chain
from pathlib import Path

from pydantic import BaseModel

from data_owner_client.data.pairs import Pair, list_of_pairs
from data_owner_client.data.reading.problems import Problems
from data_owner_client.data.tasks import Task
from data_owner_client.data.validation_split import split_validation
from data_owner_client.memory.build import MemoryBuild
from data_owner_client.memory.grants import Demand, require_granted
from data_owner_client.memory.store import TRAIN, VALIDATION, ExternalMemory
from data_owner_client.memory.target_changes import describe_target_changes
from data_owner_client.memory.types import ContextMode
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.plm.tokenizer import PlmTokenizer
from data_owner_client.runtime.arguments import AnyPath, require_loaded, to_path
from data_owner_client.runtime.path_text import PathText
from data_owner_client.runtime.progress import Reporter
from protocol.errors import InvalidData


class MemoryReport(BaseModel):
    """Result of `build_memories`.

    Attributes:
        folder: folder that holds both memories.
        examples: pairs in the training memory.
        rows: target tokens in the training memory.
        validation_examples: pairs in the validation memory.
        validation_rows: target tokens in the validation memory.
        context_mode: whether the contexts are `private` or `teacher-forced`.
        length_ratio: target tokens per source token in the training memory.
        seconds: duration of the build.
    """

    folder: PathText
    examples: int
    rows: int
    validation_examples: int
    validation_rows: int
    context_mode: ContextMode
    length_ratio: float
    seconds: float


def build_memories(
    plm: RemotePlm,
    task: Task,
    pairs: Iterable[Pair],
    folder: AnyPath,
    *,
    validation: Iterable[Pair] | None = None,
    validation_fraction: float = 0.05,
    context_mode: ContextMode = "private",
    share_targets: bool = False,
    overwrite: bool = False,
    skip_invalid: bool = False,
    reporter: Reporter | None = None,
) -> MemoryReport:
    """Build `folder/train` and `folder/validation`, or finish what an interrupted run began.

    Args:
        plm: the remote model that computes the representations.
        task: template that turns source texts into prompts.
        pairs: texts to store; each must have a target.
        folder: folder for both memories; created if it is missing.
        validation: held-out pairs; None to set a share of `pairs` aside.
        validation_fraction: share of `pairs` to set aside, 0 to 1; ignored if `validation` is not None.
        context_mode: `private` sends only prompts; `teacher-forced` also sends the targets (`memory.build`).
        share_targets: consent to show the targets to the PLM's owner; `teacher-forced` requires it.
        overwrite: delete the memories in `folder` first.
        skip_invalid: leave out pairs that cannot be used, and log how many there are.
        reporter: receives the progress; None for no reports.

    Raises:
        InvalidData: pairs cannot be used, the folder holds another memory or is in use, or the disk is full.
        Forbidden: the owner does not grant what building and training need.
        PemaError: a call to the PLM failed.
    """
    started = time.perf_counter()
    require_loaded(task, "The task", "load_task(name_or_path)")
    folder, pairs = to_path(folder), list_of_pairs(pairs)
    task = with_day_of_memory(task, plm.tokenizer, *([] if overwrite else [folder / TRAIN]))
    if validation is None:
        train_pairs, held_out = split_validation(pairs, validation_fraction)
    else:
        train_pairs, held_out = pairs, list_of_pairs(validation)
    reporter = reporter or Reporter()
    if share_targets or context_mode == "private":
        reporter.say(disclosure_notice(context_mode))
    demand, problems = Demand(context_mode), Problems()
    builds = [
        MemoryBuild.prepare(
            plm,
            task,
            part,
            folder / name,
            context_mode=context_mode,
            share_targets=share_targets,
            with_logsumexp=name == VALIDATION,
            overwrite=overwrite,
            demand=demand,
            problems=problems,
            reporter=reporter,
        )
        for name, part in ((TRAIN, train_pairs), (VALIDATION, held_out))
    ]
    problems.settle(len(train_pairs) + len(held_out), skip=skip_invalid)
    for build in builds:
        if not build.pairs:
            raise InvalidData(f"No pair is left for {build.folder}.", hint="Give more pairs.")
    if changes := describe_target_changes(plm.tokenizer, chain(*(build.pairs for build in builds))):
        reporter.say(changes)
    require_granted(plm, demand, reporter)
    memories = [build.run(reporter) for build in builds]
    return MemoryReport(
        folder=str(folder),
        examples=memories[0].manifest.examples,
        rows=memories[0].manifest.rows,
        validation_examples=memories[1].manifest.examples,
        validation_rows=memories[1].manifest.rows,
        context_mode=context_mode,
        length_ratio=memories[0].length_ratio,
        seconds=time.perf_counter() - started,
    )


def with_day_of_memory(task: Task, tokenizer: PlmTokenizer, *folders: Path) -> Task:
    """The task on the day when its memory was begun: as the first memory in `folders` has it, or else today.

    Only tasks whose chat template reads the clock have a day.
    """
    for folder in folders:
        with suppress(InvalidData):
            return task.on_day(ExternalMemory(folder).manifest.plan.task.date, tokenizer)
    return task.on_day(date.today(), tokenizer)


def disclosure_notice(context_mode: ContextMode) -> str:
    """One line that says what leaves this machine while a memory is built."""
    if context_mode == "private":
        return "Leaves this machine: the prompts with their source texts, and the targets' lengths. No target text."
    return "Leaves this machine: the prompts with their source texts, and every target text (--share-targets)."

"""Build the memories of the training pairs and the held-out pairs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import date
from itertools import chain
from pathlib import Path

from pydantic import BaseModel

from data_owner_client.data.earlier_answers import shows_earlier_answers, without_earlier_answers
from data_owner_client.data.label_tokens import LabelTokenizer, with_labels_of
from data_owner_client.data.pairs import Pair, list_of_pairs
from data_owner_client.data.reading.problems import Problems
from data_owner_client.data.redaction.key import new_key, open_key, replace_key
from data_owner_client.data.redaction.redactor import Redactor
from data_owner_client.data.redaction.rules import Redaction
from data_owner_client.data.tasks import Task
from data_owner_client.data.validation_split import split_validation
from data_owner_client.memory.build import MemoryBuild
from data_owner_client.memory.grants import Demand, require_granted
from data_owner_client.memory.pair_changes import describe_changes
from data_owner_client.memory.store import TRAIN, VALIDATION, ExternalMemory
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
        context_mode: source of the contexts.
        length_ratio: target tokens per source token in the training memory.
        late_answers_left_out: answers that were left out because their prompts would show earlier answers.
        replaced: number of spans that surrogates replace, by kind; empty unless the memories are redacted.
        seconds: duration of the build.
    """

    folder: PathText
    examples: int
    rows: int
    validation_examples: int
    validation_rows: int
    context_mode: ContextMode
    length_ratio: float
    late_answers_left_out: int
    replaced: dict[str, int] = {}
    seconds: float


def build_memories(
    plm: RemotePlm,
    task: Task,
    pairs: Iterable[Pair],
    folder: AnyPath,
    *,
    validation: Iterable[Pair] | None = None,
    validation_fraction: float = 0.05,
    context_mode: ContextMode | None = None,
    share_targets: bool = False,
    redaction: Redaction | None = None,
    share_earlier_answers: bool = False,
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
        context_mode: `private` sends only prompts; `teacher-forced` also sends the targets, and `redacted` sends them
            with surrogates (`memory.build`). None for `redacted` with a redaction, else `private`.
        share_targets: consent to show the targets to the PLM's owner; `teacher-forced` requires it.
        redaction: rules of what surrogates replace before anything is sent (`load_redaction`); None for no surrogates.
        share_earlier_answers: consent to show earlier answers of conversations in the prompts for later ones. Without
            it, `private` learns only answers whose prompts show none.
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
    require_loaded(redaction, "The redaction", "load_redaction(path)")
    folder, pairs = to_path(folder), list_of_pairs(pairs)
    reporter = reporter or Reporter()
    context_mode = context_mode or ("redacted" if redaction else "private")
    redactor, key = None, b""
    if redaction:
        key = new_key() if overwrite else open_key(folder, is_begun=_is_redacted(folder / TRAIN))
        redactor = Redactor(redaction, key, plm.tokenizer)
    parts = [pairs] if validation is None else [pairs, list_of_pairs(validation)]
    total = sum(map(len, parts))
    if context_mode == "private" and not share_earlier_answers:
        parts = without_earlier_answers(parts, reporter)
    left_out = total - sum(map(len, parts))
    train_pairs, held_out = parts if len(parts) == 2 else split_validation(parts[0], validation_fraction)
    task = task_of_memory(task, plm.tokenizer, [train_pairs, held_out], *([] if overwrite else [folder / TRAIN]))
    if share_targets or context_mode != "teacher-forced":
        shown = any(map(shows_earlier_answers, chain(train_pairs, held_out)))
        sources = redaction is not None and redaction.sources
        reporter.say(disclosure_notice(context_mode, task, earlier_answers=shown, redacted_sources=sources))
    demand, problems = Demand(context_mode), Problems()
    builds = [
        MemoryBuild.prepare(
            plm,
            task,
            part,
            folder / name,
            context_mode=context_mode,
            share_targets=share_targets,
            held_out=name == VALIDATION,
            overwrite=overwrite,
            redactor=redactor,
            demand=demand,
            problems=problems,
            reporter=reporter,
        )
        for name, part in ((TRAIN, train_pairs), (VALIDATION, held_out))
    ]
    if redactor:
        reporter.say(redactor.summary)
    problems.settle(len(train_pairs) + len(held_out), skip=skip_invalid)
    for build in builds:
        if not build.pairs:
            raise InvalidData(
                f"No pair is left for {build.folder}.", hint="Give more pairs, or say another --validation-fraction."
            )
    for line in describe_changes(task, plm.tokenizer, chain(*(build.pairs for build in builds))):
        reporter.say(line)
    if task.kind == "classify":
        demand.add_choice(builds[1].sizes, LabelTokenizer(plm.tokenizer, task.labels).check(task))
    require_granted(plm, demand, reporter)
    if redactor and overwrite:
        replace_key(folder, key)  # not before all is checked: an interrupted memory needs its key to go on
    memories = [build.run(reporter) for build in builds]
    return MemoryReport(
        folder=str(folder),
        examples=memories[0].manifest.examples,
        rows=memories[0].manifest.rows,
        validation_examples=memories[1].manifest.examples,
        validation_rows=memories[1].manifest.rows,
        context_mode=context_mode,
        length_ratio=memories[0].length_ratio,
        late_answers_left_out=left_out,
        replaced=dict(redactor.replaced.most_common()) if redactor else {},
        seconds=time.perf_counter() - started,
    )


def _is_redacted(folder: Path) -> bool:
    """True if a folder has a redacted memory, be it of a build that was interrupted."""
    try:
        return ExternalMemory(folder).manifest.plan.context_mode == "redacted"
    except InvalidData:
        return False


def task_of_memory(task: Task, tokenizer: PlmTokenizer, parts: Sequence[Sequence[Pair]], *folders: Path) -> Task:
    """The task with all that is fixed when its memory is begun: as the first memory in `folders` has it, or else new.

    A task whose chat template reads the clock has a day, by default today. A `classify` task has labels, by default
    those of the pairs.

    Args:
        task: any task.
        tokenizer: the PLM's tokenizer.
        parts: pairs to train on, and pairs to validate on.
        folders: folders of memories, which need not exist.

    Raises:
        InvalidData: the targets are too many to be labels, cannot be labels, or become the same tokens.
    """
    day: date | None = date.today()
    for folder in folders:
        with suppress(InvalidData):
            begun = ExternalMemory(folder).manifest.plan.task
            day = begun.date
            if task.kind == begun.kind == "classify" and not task.labels:
                task = task.model_copy(update={"labels": begun.labels})
            break
    task = with_labels_of(task.on_day(day, tokenizer), parts)
    if task.kind == "classify":
        LabelTokenizer(tokenizer, task.labels).check(task)
    return task


def disclosure_notice(
    context_mode: ContextMode, task: Task, *, earlier_answers: bool = False, redacted_sources: bool = False
) -> str:
    """One line that says what leaves this machine while a memory is built.

    Args:
        context_mode: contexts of the memory.
        task: task of the memory.
        earlier_answers: whether prompts show earlier answers of their conversations.
        redacted_sources: whether the sources of a redacted memory have surrogates, too.
    """
    prompts = "the prompts with their source texts"
    if context_mode == "teacher-forced":
        earlier = " and earlier answers that are not learned" if earlier_answers else ""
        return f"Leaves this machine: {prompts}, and every target text{earlier} (--share-targets)."
    if context_mode == "redacted":
        earlier = ", earlier answers included," if earlier_answers else ""
        sources = "" if redacted_sources else "; the sources have none"
        return (
            f"Leaves this machine: {prompts}, and every target text{earlier} with surrogates in place of what the "
            f"rules find (--share-redacted){sources}. `train` will show which tokens occur in the true targets, and "
            "`translate` will show its texts as they are."
        )
    if task.kind == "classify":
        return (
            f"Leaves this machine: {prompts}, and the length of the longest label. `train` and `translate` will show "
            "the names of the labels, but not which text of this memory has which."
        )
    if earlier_answers:
        return (
            f"Leaves this machine: {prompts}, the earlier answers of conversations in them (--share-earlier-answers), "
            "and the targets' lengths. Of each conversation, no last answer."
        )
    return f"Leaves this machine: {prompts}, and the targets' lengths. No target text."

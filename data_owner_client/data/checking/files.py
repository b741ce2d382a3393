"""Checks of files alone: what they are, and texts that are there several times."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import TYPE_CHECKING

from data_owner_client.data.checking.report import (
    DataReport,
    Example,
    LabelCounts,
    Lengths,
    Overlap,
    PartReport,
    Repeated,
    counted,
)
from data_owner_client.data.earlier_answers import shows_earlier_answers
from data_owner_client.data.pair_files import PairFile
from data_owner_client.data.pairs import Pair, hash_text
from data_owner_client.data.reading.files import display_name
from data_owner_client.data.reading.problems import ProblemKind, Problems
from data_owner_client.data.reading.records import Recognised, scan
from data_owner_client.data.reading.settings import ReadingSettings
from protocol.errors import InvalidData

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FEW_PAIRS = 10
_MANY_LABELS = 1000
_LISTED = 10
_EXAMPLES = 3


@dataclass(frozen=True)
class Part:
    """A file that was read whole.

    Attributes:
        pairs: its usable pairs.
        report: what it is, and what is in it.
        question_N: hash of each pair's question.
    """

    pairs: PairFile
    report: PartReport
    question_N: NDArray[np.uint64]


def read_parts(
    paths: Sequence[str | Path], settings: ReadingSettings, problems: Problems, *, are_labels: bool = False
) -> list[Part]:
    """Read files with pairs.

    Args:
        paths: the files.
        settings: settings of reading.
        problems: receives the problems of records.
        are_labels: whether targets are labels in files of any form.

    Raises:
        InvalidData: a file as a whole cannot be read.
    """
    return [_read_part(path, settings, problems, are_labels=are_labels) for path in paths]


def check_files(parts: Sequence[Part], problems: Problems, labels: Sequence[str] = ()) -> DataReport:
    """Report on files without a server.

    Args:
        parts: the files.
        problems: problems of their records.
        labels: labels of the task; empty if it has none.
    """
    reports = [part.report for part in parts]
    return DataReport(
        parts=reports,
        overlaps=list(_overlaps(parts)),
        problems=problems.by_kind(),
        warnings=[*_warnings(reports), *_unused_labels(parts[0], labels)],
        examples=[
            Example(prompt=pair.source, target=[pair.target or ""]) for pair in islice(parts[0].pairs, _EXAMPLES)
        ],
    )


def with_problem_of_all(report: DataReport, error: InvalidData) -> DataReport:
    """The report with a problem of the first file as a whole."""
    problem = ProblemKind(kind=error.detail, count=1, name=report.parts[0].name, lines=[], hint=error.hint)
    report.problems = [*report.problems, problem]
    return report


def _read_part(path: str | Path, settings: ReadingSettings, problems: Problems, *, are_labels: bool) -> Part:
    recognised, total = Recognised(), 0

    def usable() -> Iterator[Pair]:
        nonlocal total
        for pair in scan(path, settings, problems, need_targets=True, recognised=recognised):
            total += 1
            if pair is not None:
                yield pair

    name = display_name(path)
    pairs = PairFile.spool(usable(), name)
    if not total and not recognised.unlearned:
        raise InvalidData(f"{name} is empty.", hint="Give at least one pair.")
    form = recognised.form
    return _part_of(
        pairs,
        PartReport(
            name=name,
            form=form.title if form else "texts",
            container=recognised.container,
            records=recognised.records,
            record_noun=form.record if form else "record",
            pairs=len(pairs),
            unlearned=recognised.unlearned,
        ),
        are_labels=are_labels or (form is not None and "label" in form.keys),
    )


def _part_of(pairs: PairFile, report: PartReport, *, are_labels: bool) -> Part:
    """The part with all that one pass over its pairs tells. In memory are some numbers for each pair."""
    import numpy as np

    question_N, target_N, line_N = array("Q"), array("Q"), array("I")
    sources, targets, labels = array("I"), array("I"), Counter[str]()
    for pair in pairs:
        question, target = json.dumps(_question(pair)), json.dumps([pair.target, pair.reply])
        question_N.append(hash_text(question))
        target_N.append(hash_text(target))
        line_N.append(pair.origin.number if pair.origin else 0)
        sources.append(len(pair.source))
        targets.append(len(pair.target or ""))
        report.late_answers += shows_earlier_answers(pair)
        if are_labels and len(labels) <= _MANY_LABELS:
            labels[pair.target or ""] += 1
    questions = np.frombuffer(question_N, np.uint64) if question_N else np.zeros(0, np.uint64)
    report.duplicates, report.contradictions = _repeated(questions, target_N, line_N)
    report.sources, report.targets = Lengths.of(sources), Lengths.of(targets)
    report.labels = _label_counts(labels) if labels else None
    return Part(pairs, report, questions)


def _repeated(question_N: NDArray[np.uint64], target_N: array[int], line_N: array[int]) -> tuple[Repeated, Repeated]:
    """Pairs that are there before, and pairs whose question is there before with another target."""
    first_target: dict[int, int] = {}
    seen = set[tuple[int, int]]()
    duplicates, contradictions = Repeated(), Repeated()
    # Only questions that occur again need to be remembered.
    for at in _again(question_N):
        question, target = int(question_N[at]), target_N[at]
        if (question, target) in seen:
            _count(duplicates, line_N[at])
        elif first_target.setdefault(question, target) != target:
            _count(contradictions, line_N[at])
        seen.add((question, target))
    return duplicates, contradictions


def _again(question_N: NDArray[np.uint64]) -> list[int]:
    import numpy as np

    _, inverse_N, count = np.unique(question_N, return_inverse=True, return_counts=True)
    again: list[int] = np.flatnonzero(count[inverse_N] > 1).tolist()
    return again


def _count(repeated: Repeated, line: int) -> None:
    repeated.count += 1
    if len(repeated.lines) < _LISTED and line not in repeated.lines:
        repeated.lines = [*repeated.lines, line]


def _label_counts(labels: Counter[str]) -> LabelCounts:
    single = [label for label, count in labels.items() if count == 1]
    return LabelCounts(
        labels=len(labels), largest=dict(labels.most_common(_LISTED)), single=single[:_LISTED], singles=len(single)
    )


def _overlaps(parts: Sequence[Part]) -> Iterator[Overlap]:
    """Yield the questions that two parts have in common, named in the smaller one."""
    import numpy as np

    for one, other in combinations(parts, 2):
        smaller, larger = sorted((one, other), key=lambda part: len(part.pairs))
        common = np.flatnonzero(np.isin(smaller.question_N, larger.question_N))
        if len(common):
            origins = [smaller.pairs[int(at)].origin for at in common[:_LISTED]]
            yield Overlap(
                first=smaller.report.name,
                second=larger.report.name,
                count=len(common),
                lines=[origin.number for origin in origins if origin],
            )


def _warnings(reports: Sequence[PartReport]) -> Iterator[str]:
    if reports[0].pairs < _FEW_PAIRS:
        yield f"{reports[0].name} has {counted(reports[0].pairs, 'pair')}. Some hundreds teach much more."
    for report in reports:
        labels = report.labels
        if labels and labels.labels > _MANY_LABELS:
            yield f"{report.name} has more than {_MANY_LABELS:,} different targets, which are hardly labels."
        elif labels and labels.singles:
            names = ", ".join(labels.single) + (", …" if labels.singles > len(labels.single) else "")
            yield f"{report.name} has labels that occur once: {names}."


def _unused_labels(part: Part, labels: Sequence[str]) -> Iterator[str]:
    used = {pair.target for pair in part.pairs} if labels else set()
    if unused := [label for label in labels if label not in used]:
        names = ", ".join(unused[:_LISTED]) + (", …" if len(unused) > _LISTED else "")
        yield f"{part.report.name} has no pair with these labels of the task: {names}."


def _question(pair: Pair) -> object:
    """The whole question: without a conversation the source, so that a single question equals its text."""
    if pair.conversation is None:
        return pair.source
    return [pair.conversation.turns, pair.conversation.tools]

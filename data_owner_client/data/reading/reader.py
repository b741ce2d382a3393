"""Pairs, sources and hypotheses from the user's files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from data_owner_client.data.pair_files import PairFile
from data_owner_client.data.pairs import Pair
from data_owner_client.data.reading.fields import usable_text
from data_owner_client.data.reading.files import display_name, open_text
from data_owner_client.data.reading.problems import InvalidText, Origin, Problems, require_decoded
from data_owner_client.data.reading.records import Recognised, lines_as_sources, scan
from data_owner_client.data.reading.settings import DEFAULT_READING, Format, ReadingSettings
from protocol.errors import InvalidData


def read_pairs(
    path: str | Path,
    *,
    format: Format | None = None,  # noqa: A002  (the usual name in such readers)
    source_field: str | None = None,
    target_field: str | None = None,
    header: bool = True,
    labels: Sequence[str] = (),
    skip_invalid: bool = False,
    need_targets: bool = True,
) -> list[Pair]:
    """Read pairs from a file, or from standard input if `path` is `-`, into memory.

    The data owner's guide has tables of the containers and forms. Spaces, tabs and line ends around a text are removed.

    Args:
        path: path of the file.
        format: format of the file; None to infer it from the name, or from the content where the name does not tell.
        source_field: field or column with the source; None to infer it from the form of the records.
        target_field: field or column with the target; None to infer it from the form of the records.
        header: tables begin with a line of column names. If False, columns have the names `1`, `2` and so on.
        labels: names of the labels of a classification, in the order of their numbers from 0.
        skip_invalid: leave out texts that cannot be used, and log how many there are.
        need_targets: whether each pair must have a target; if False, targets are not read.

    Raises:
        InvalidData: the file is missing, empty or malformed, or has texts that cannot be used. The message has counts
            and the first lines of all kinds of problems.
    """
    settings = ReadingSettings(
        format=format,
        source_field=source_field,
        target_field=target_field,
        header=header,
        labels=tuple(labels),
        skip_invalid=skip_invalid,
    )
    return list(_usable_pairs(path, settings, need_targets=need_targets))


def spool_pairs(path: str | Path, settings: ReadingSettings = DEFAULT_READING) -> PairFile:
    """Read pairs as `read_pairs` does, but into a temporary file, as they may be larger than memory.

    Raises:
        InvalidData: as `read_pairs`, or the disk is full.
    """
    return PairFile.spool(_usable_pairs(path, settings, need_targets=True), display_name(path))


def read_parallel(sources: str | Path, targets: str | Path, *, skip_invalid: bool = False) -> list[Pair]:
    """Read pairs from two text files, line by line, into memory.

    Raises:
        InvalidData: the files differ in length, or have texts that cannot be used.
    """
    return list(_parallel_pairs(sources, targets, skip_invalid=skip_invalid))


def spool_parallel(sources: str | Path, targets: str | Path, settings: ReadingSettings = DEFAULT_READING) -> PairFile:
    """Read pairs as `read_parallel` does, but into a temporary file, as they may be larger than memory.

    Raises:
        InvalidData: as `read_parallel`, or the settings ask for another format than text, or the disk is full.
    """
    if settings.format not in (None, "text"):
        raise InvalidData(
            f"Parallel files are text, and {settings.format} was asked for.",
            hint="Leave --format away, or use --input.",
        )
    return PairFile.spool(_parallel_pairs(sources, targets, skip_invalid=settings.skip_invalid), display_name(sources))


def spool_sources(path: str | Path, settings: ReadingSettings = DEFAULT_READING, *, trim: bool = True) -> PairFile:
    """Read one source for each record into a temporary file; blank and left-out ones are empty, to keep the order.

    Args:
        path: path of the file; `-` is standard input.
        settings: settings of reading.
        trim: remove spaces, tabs and line ends around a text.

    Raises:
        InvalidData: as `read_pairs`, or the disk is full.
    """
    problems, total = Problems(), 0

    def sources() -> Iterator[Pair]:
        nonlocal total
        for pair in scan(path, settings, problems, need_targets=False, trim=trim):
            total += 1
            yield pair or Pair("")

    spooled = PairFile.spool(sources(), display_name(path))
    _require_some(path, total, "text")
    problems.settle(total, skip=settings.skip_invalid)
    return spooled


def read_hypotheses(path: str | Path) -> list[str]:
    """Read the lines of a text file, empty ones included.

    Raises:
        InvalidData: the file cannot be read, or has bytes that are not UTF-8.
    """
    problems = Problems()
    with open_text(path) as source:
        texts = [pair and pair.source for pair in lines_as_sources(source, problems)]
    problems.settle(len(texts), skip=False)
    return [text or "" for text in texts]


def _usable_pairs(path: str | Path, settings: ReadingSettings, *, need_targets: bool) -> Iterator[Pair]:
    """The pairs of a file. At its end, its problems are reported."""
    problems, recognised, total = Problems(), Recognised(), 0
    for pair in scan(path, settings, problems, need_targets=need_targets, recognised=recognised):
        total += 1
        if pair is not None:
            yield pair
    if not total and recognised.unlearned:
        raise InvalidData(f"{display_name(path)} excludes all answers from learning.", hint="Give some the weight 1.")
    _require_some(path, total, "pair" if need_targets else "text")
    problems.settle(total, skip=settings.skip_invalid)


def _require_some(path: str | Path, total: int, noun: str = "pair") -> None:
    if not total:
        raise InvalidData(f"{display_name(path)} is empty.", hint=f"Give at least one {noun}.")


def _parallel_pairs(sources: str | Path, targets: str | Path, *, skip_invalid: bool) -> Iterator[Pair]:
    problems, total = Problems(), 0
    with open_text(sources) as source, open_text(targets) as target:
        counts = [0, 0]
        for one, other in zip_longest(source.lines(), target.lines()):
            counts = [counts[0] + (one is not None), counts[1] + (other is not None)]
            if one is None or other is None:
                continue
            total += 1
            texts = []
            for file, (number, line), name in ((source, one, "source"), (target, other, "target")):
                try:
                    require_decoded(line)
                    texts.append(usable_text(line, name))
                except InvalidText as problem:
                    problems.add(Origin(file.name, number), problem)
                    break
            else:
                yield Pair(texts[0], texts[1], Origin(source.name, total))
    if counts[0] != counts[1]:
        raise InvalidData(
            f"{sources} has {counts[0]} lines and {targets} has {counts[1]}.",
            hint="Parallel files have the same number of lines.",
        )
    _require_some(sources, total)
    problems.settle(total, skip=skip_invalid)

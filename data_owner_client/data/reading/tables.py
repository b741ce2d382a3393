"""Rows of CSV and TSV files, each with as many fields as the first line."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from data_owner_client.data.reading.fields import look_up
from data_owner_client.data.reading.files import Source
from data_owner_client.data.reading.forms import recognise, unknown_form
from data_owner_client.data.reading.problems import InvalidText, require_decoded
from data_owner_client.data.reading.settings import ReadingSettings
from protocol.errors import InvalidData

Row = list[str]
_OUT_OF_PLACE = "a quotation mark out of place"
_NUMBER_OF_FIELDS = "another number of fields than the first line"
_FIELDS_HINT = "Is there a tab or comma inside a text? Quotation marks keep it together in CSV, and not in TSV."
# Every such row is read again from its second line on; a file with more of them has no quotation marks at all.
_MOST_UNBALANCED = 100
_DELIMITERS = ",;\t"
# Excel writes the delimiter into a first line of its own.
_EXCEL_DELIMITER = re.compile(r'"?sep=([,;|\t])"?\s*')


def tsv_rows(source: Source) -> Iterator[tuple[int, Row | InvalidText]]:
    """Line number and fields of each line. Quotation marks have no meaning."""
    for number, line in source.lines():
        yield number, _decoded(line.rstrip("\r\n").split("\t"))


def csv_rows(
    source: Source, knows_columns: Callable[[Row], bool], *, trim: bool = True
) -> Iterator[tuple[int, Row | InvalidText]]:
    """Number of the first line and fields of each row, or what is wrong with it.

    The delimiter is a comma, or the semicolon or tab that the first line needs.

    Args:
        source: the file.
        knows_columns: says if the columns of a first row are those of a file with texts.
        trim: spaces before a field do not count, also before quotation marks.

    Raises:
        InvalidData: quotation marks are out of place in many rows.
    """
    lines = source.lines()
    first = next(lines, None)
    if first is None:
        return
    if told := _EXCEL_DELIMITER.fullmatch(first[1]):
        delimiter = told[1]
    else:
        delimiter = _delimiter(first[1], knows_columns)
        lines = _prepended(first, lines)
    yield from _balanced_rows(source.name, lines, delimiter, trim=trim)


def _delimiter(line: str, knows_columns: Callable[[Row], bool]) -> str:
    def fit(delimiter: str) -> tuple[bool, bool]:
        row = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
        return knows_columns([name.strip() for name in row]), len(row) > 1

    try:
        return max(_DELIMITERS, key=fit)  # the first of equals
    except csv.Error:
        return ","


def _balanced_rows(
    name: str, lines: Iterator[tuple[int, str]], delimiter: str, *, trim: bool
) -> Iterator[tuple[int, Row | InvalidText]]:
    again, row_lines = deque[tuple[int, str]](), list[tuple[int, str]]()

    def texts() -> Iterator[str]:
        while line := again.popleft() if again else next(lines, None):
            row_lines.append(line)
            yield line[1]

    unbalanced = 0
    while True:
        try:
            for row in csv.reader(texts(), delimiter=delimiter, strict=True, skipinitialspace=trim):
                number = row_lines[0][0]
                row_lines.clear()
                yield number, _decoded(row)
            return
        except csv.Error as error:
            number, _ = row_lines[0]
            yield number, InvalidText(_kind(str(error), len(row_lines)), hint="Double the quotation marks in a text.")
            # A quotation mark that is not closed would take the lines behind it, too.
            again.extendleft(reversed(row_lines[1:]))
            row_lines.clear()
            unbalanced += 1
        if unbalanced > _MOST_UNBALANCED:
            raise InvalidData(
                f"{name} has quotation marks out of place in more than {_MOST_UNBALANCED} rows.",
                hint="If its quotation marks mean nothing, make it a TSV file; say --format tsv.",
            )


def _kind(reason: str, lines: int) -> str:
    if reason.startswith("new-line"):
        return "a carriage return outside of quotation marks"
    if reason.startswith("field larger") and lines == 1:
        return f"a field of more than {csv.field_size_limit():,} characters"
    return "a quotation mark that is not closed" if lines > 1 or reason.startswith("unexpected end") else _OUT_OF_PLACE


def _decoded(row: Row) -> Row | InvalidText:
    try:
        for field in row:
            require_decoded(field)
    except InvalidText as problem:
        return problem
    return row


def _prepended(first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from rest


def table_records(
    source: Source, is_tsv: bool, settings: ReadingSettings, *, need_targets: bool, trim: bool = True
) -> Iterator[tuple[int, dict[str, Any] | InvalidText]]:
    """Yield the number of the first line and the fields by column of each row, or what is wrong with it.

    Args:
        source: the file.
        is_tsv: whether it is TSV; else it is CSV.
        settings: settings of reading. Without a header, columns have the names `1`, `2` and so on.
        need_targets: whether a column of targets is needed.
        trim: remove spaces around texts.

    Raises:
        InvalidData: the header does not name the columns that are needed.
    """

    def knows(names: Row) -> bool:
        with suppress(InvalidData):
            _require_columns(source.name, 1, names, settings, need_targets=need_targets)
            return True
        return False

    names: Row = []
    for number, row in tsv_rows(source) if is_tsv else csv_rows(source, knows, trim=trim):
        if isinstance(row, InvalidText):
            if not names:
                raise InvalidData(f"{source.name}:{number} has {row.kind}.", hint=row.hint)
            yield number, row
        elif not names:
            if not any(row):
                continue
            names = [name.strip() for name in row] if settings.header else [str(n + 1) for n in range(len(row))]
            _require_columns(source.name, number, names, settings, need_targets=need_targets)
            if not settings.header:
                yield number, dict(zip(names, row, strict=True))
        elif len(row) == len(names):
            yield number, dict(zip(names, row, strict=True))
        elif len(names) == 1 and not row:  # a blank line of CSV
            yield number, {names[0]: ""}
        elif any(row):
            yield number, InvalidText(_NUMBER_OF_FIELDS, hint=_FIELDS_HINT)


def _require_columns(name: str, number: int, names: Row, settings: ReadingSettings, *, need_targets: bool) -> None:
    """Require each column that is needed, once.

    Raises:
        InvalidData: one is missing, or there several times.
    """
    place = f"{name}:{number}"
    try:
        form = recognise(names, settings, need_targets=need_targets)
        if form is None:
            raise unknown_form(place, names, table=settings.header)
        needed = form.keys if need_targets else form.keys[:1]
        for key in needed:
            look_up(dict.fromkeys(names), key)
    except InvalidText as error:
        raise InvalidData(f"{place} has {error.kind.replace('field', 'column', 1)}.", hint=error.hint) from error
    if repeated := [key for key in (*needed, *form.optional) if names.count(key) > 1]:
        raise InvalidData(f"{place} has the column {repeated[0]!r} twice.", hint="Give every column its own name.")

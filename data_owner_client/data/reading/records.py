"""Records of one file as pairs: the format is found, then the form of the records, then their texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any, Literal

from data_owner_client.data.pairs import Pair
from data_owner_client.data.reading.fields import TRIMMED, Extraction, shown
from data_owner_client.data.reading.files import Source, open_binary, text_of
from data_owner_client.data.reading.forms import Form, has_form, recognise, unknown_form
from data_owner_client.data.reading.json_values import is_json, is_json_lines, json_lines, json_values
from data_owner_client.data.reading.parquet import ParquetRows
from data_owner_client.data.reading.problems import InvalidText, Origin, Problems, require_decoded
from data_owner_client.data.reading.settings import Format, ReadingSettings
from data_owner_client.data.reading.tables import table_records
from protocol.errors import InvalidData

_SUFFIXES: dict[str, Format | Literal["JSON"]] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "JSON",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".txt": "text",
    ".parquet": "parquet",
}
_CONTAINERS: dict[Format, str] = {
    "jsonl": "JSON lines",
    "json": "JSON",
    "csv": "CSV",
    "tsv": "TSV",
    "text": "text",
    "parquet": "Parquet",
}


@dataclass
class Recognised:
    """Container, form and counts of a file.

    Attributes:
        container: name of its container, such as `JSON lines`.
        form: form of its records; None if it has none, such as a text file.
        records: number of its records.
        unlearned: number of its answers that it excludes from learning.
    """

    container: str = ""
    form: Form | None = None
    records: int = 0
    unlearned: int = 0


def scan(
    path: str | Path,
    settings: ReadingSettings,
    problems: Problems,
    *,
    need_targets: bool,
    trim: bool = True,
    recognised: Recognised | None = None,
) -> Iterator[Pair | None]:
    """Yield the pairs of each record of a file; None for each problem, which was added to `problems`.

    Args:
        path: path of the file; `-` is standard input.
        settings: settings of reading.
        problems: receives the problems of records.
        need_targets: whether each pair must have a target; if False, sources may be blank.
        trim: remove spaces, tabs and line ends around a text.
        recognised: receives what the file is; None if nobody asks.

    Raises:
        InvalidData: the file as a whole cannot be read.
    """
    recognised = recognised or Recognised()
    extraction = Extraction(need_targets, trim, settings.labels)
    with open_binary(path) as file:
        packed = ", gzipped" if file.gzipped else ""
        if file.is_parquet or (settings.format or _format_by_name(file.name)) == "parquet":
            recognised.container = _CONTAINERS["parquet"] + packed
            with file.seekable() as data:
                rows = ParquetRows(data, file.name)
                extraction.labels = extraction.labels or rows.label_names(settings.target_field or "label")
                records = rows.records(settings, need_targets=need_targets)
                yield from _Records(file.name, records, settings, problems, extraction, recognised).pairs()
            return
        with text_of(file) as source:
            kind = _format(source, settings, need_targets=need_targets)
            recognised.container = _CONTAINERS[kind] + packed
            if kind != "text":
                settings = _with_numbered_columns(settings, kind)
                records = _records(source, kind, settings, extraction)
                yield from _Records(source.name, records, settings, problems, extraction, recognised).pairs()
            elif need_targets:
                raise InvalidData(
                    f"{source.name} has no targets.", hint="Give --sources and --targets, or say --format tsv or csv."
                )
            else:
                yield from lines_as_sources(source, problems, trim=trim)


def lines_as_sources(source: Source, problems: Problems, *, trim: bool = True) -> Iterator[Pair | None]:
    """Yield a pair without target for each line, blank ones included; None for one that is no text."""
    for number, line in source.lines():
        origin = Origin(source.name, number)
        try:
            require_decoded(line)
            yield Pair(line.strip(TRIMMED) if trim else line.rstrip("\r\n"), origin=origin)
        except InvalidText as problem:
            problems.add(origin, problem)
            yield None


_RawRecords = Iterator[tuple[int, dict[str, Any] | InvalidText]]


def _records(source: Source, kind: Format, settings: ReadingSettings, extraction: Extraction) -> _RawRecords:
    if kind == "jsonl":
        return json_lines(source)
    if kind == "json":
        return json_values(source, partial(has_form, settings=settings))
    return table_records(source, kind == "tsv", settings, need_targets=extraction.need_targets, trim=extraction.trim)


def _with_numbered_columns(settings: ReadingSettings, kind: Format) -> ReadingSettings:
    """The settings, which name the first two columns of a table without a header if they name none."""
    if kind not in ("csv", "tsv") or settings.header:
        return settings
    first, second = settings.source_field or "1", settings.target_field or "2"
    return replace(settings, source_field=first, target_field=second)


class _Records:
    """The records of one file, all of one form."""

    def __init__(
        self,
        name: str,
        records: _RawRecords,
        settings: ReadingSettings,
        problems: Problems,
        extraction: Extraction,
        recognised: Recognised,
    ) -> None:
        self._name = name
        self._records = records
        self._settings = settings
        self._problems = problems
        self._extraction = extraction
        self._recognised = recognised

    def pairs(self) -> Iterator[Pair | None]:
        """Yield the pairs of each record; None for each problem.

        Raises:
            InvalidData: the file is malformed, or the form of its records is not known.
        """
        unknown: tuple[Origin, list[str]] | None = None
        for number, record in self._records:
            origin = Origin(self._name, number)
            self._recognised.records += 1
            try:
                if isinstance(record, InvalidText):
                    raise record
                if unknown is None and self._recognised.form is None:
                    unknown = origin, list(record)
                found = self._pairs(record, origin)
            except InvalidText as problem:
                found = [problem]
            for each in found:
                if isinstance(each, InvalidText):
                    self._problems.add(origin, each)
                yield None if isinstance(each, InvalidText) else each
        if unknown is not None and self._recognised.form is None:
            raise unknown_form(str(unknown[0]), unknown[1])
        self._recognised.unlearned = self._extraction.unlearned

    def _pairs(self, record: dict[str, Any], origin: Origin) -> list[Pair | InvalidText]:
        self._extraction.origin = origin
        try:
            form = self._recognised.form or recognise(
                record, self._settings, need_targets=self._extraction.need_targets
            )
            if form is None:
                raise InvalidText("fields of no known form", hint=f"It has {shown(record)}.")
            self._recognised.form = form
            return list(form.read(record, self._extraction))
        except InvalidText:
            raise
        except InvalidData as error:  # of the whole file
            raise InvalidData(f"{origin}: {error.detail}", hint=error.hint) from error


def _format(source: Source, settings: ReadingSettings, *, need_targets: bool) -> Format:
    """The format that the settings name, else that of the file's name, else that of its content.

    Raises:
        InvalidData: none of them tells.
    """
    if settings.format is not None:
        return settings.format
    by_name = _format_by_name(source.name)
    if by_name == "JSON" or (by_name is None and is_json(source.head)):
        return "jsonl" if is_json_lines(source.head) else "json"
    if by_name is not None:
        return by_name
    if not need_targets:
        return "text"
    if not source.head.strip():
        return "jsonl"  # any: it is empty
    if "\t" in source.head.lstrip().split("\n")[0]:
        return "tsv"
    raise InvalidData(
        f"The format of {source.name} is not clear from its name or content.",
        hint="Say --format jsonl, json, csv or tsv.",
    )


def _format_by_name(name: str) -> Format | Literal["JSON"] | None:
    path = PurePath(name.lower())
    return _SUFFIXES.get((path.with_suffix("") if path.suffix == ".gz" else path).suffix)

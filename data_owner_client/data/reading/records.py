"""Records of one file as pairs: the format is found, then the form of the records, then their texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any, Literal

from data_owner_client.data.pairs import Pair
from data_owner_client.data.reading.files import Source, open_text
from data_owner_client.data.reading.forms import Form, has_form, recognise, shown, unknown_form
from data_owner_client.data.reading.json_values import is_json, is_json_lines, json_lines, json_values
from data_owner_client.data.reading.problems import InvalidText, Origin, Problems, require_decoded, require_unicode
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
}
# Removed around a text. Other spaces, such as U+00A0 and U+3000, are a part of it.
_TRIMMED = " \t\r\n"


def scan(
    path: str | Path, settings: ReadingSettings, problems: Problems, *, need_targets: bool, trim: bool = True
) -> Iterator[Pair | None]:
    """Yield a pair for each record of a file; None for one whose problem was added to `problems`.

    Args:
        path: path of the file; `-` is standard input.
        settings: settings of reading.
        problems: receives the problems of records.
        need_targets: whether each pair must have a target; if False, sources may be blank.
        trim: remove spaces, tabs and line ends around a text.

    Raises:
        InvalidData: the file as a whole cannot be read.
    """
    with open_text(path) as source:
        kind = _format(source, settings, need_targets=need_targets)
        if kind != "text":
            yield from _Records(source, kind, settings, problems, need_targets=need_targets, trim=trim).pairs()
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
            yield Pair(line.strip(_TRIMMED) if trim else line.rstrip("\r\n"), origin=origin)
        except InvalidText as problem:
            problems.add(origin, problem)
            yield None


def usable_text(value: object, name: str, *, blank: bool = False, trim: bool = True) -> str:
    """The text of a field.

    Args:
        value: value of the field.
        name: name of the field in errors.
        blank: whether it may be blank.
        trim: remove spaces, tabs and line ends around it.

    Raises:
        InvalidText: it is no text, or blank.
    """
    require_unicode(value, name)
    text = str(value)
    if not blank and not text.strip():
        raise InvalidText(f"an empty {name}", hint="Every pair needs two texts.")
    return text.strip(_TRIMMED) if trim else text


class _Records:
    """The records of one file, all of one form."""

    def __init__(
        self,
        source: Source,
        kind: Format,
        settings: ReadingSettings,
        problems: Problems,
        *,
        need_targets: bool,
        trim: bool,
    ) -> None:
        self._source = source
        self._kind = kind
        self._settings = settings
        if kind in ("csv", "tsv") and not settings.header:
            first, second = settings.source_field or "1", settings.target_field or "2"
            self._settings = replace(settings, source_field=first, target_field=second)
        self._problems = problems
        self._need_targets = need_targets
        self._trim = trim
        self._form: Form | None = None

    def pairs(self) -> Iterator[Pair | None]:
        """Yield a pair for each record; None for one that has a problem.

        Raises:
            InvalidData: the file is malformed, or the form of its records is not known.
        """
        unknown: tuple[Origin, list[str]] | None = None
        for number, record in self._records():
            origin = Origin(self._source.name, number)
            try:
                if isinstance(record, InvalidText):
                    raise record
                if unknown is None and self._form is None:
                    unknown = origin, list(record)
                yield self._pair(record, origin)
            except InvalidText as problem:
                self._problems.add(origin, problem)
                yield None
        if unknown is not None and self._form is None:
            raise unknown_form(str(unknown[0]), unknown[1])

    def _records(self) -> Iterator[tuple[int, dict[str, Any] | InvalidText]]:
        if self._kind == "jsonl":
            return json_lines(self._source)
        if self._kind == "json":
            return json_values(self._source, partial(has_form, settings=self._settings))
        return table_records(
            self._source, self._kind == "tsv", self._settings, need_targets=self._need_targets, trim=self._trim
        )

    def _pair(self, record: dict[str, Any], origin: Origin) -> Pair:
        try:
            self._form = self._form or recognise(record, self._settings)
            if self._form is None:
                raise InvalidText("fields of no known form", hint=f"It has {shown(record)}.")
            source, target = self._form.read(record, self._need_targets)
        except InvalidText:
            raise
        except InvalidData as error:  # of the whole file
            raise InvalidData(f"{origin}: {error.detail}", hint=error.hint) from error
        source_text = usable_text(source, "source", blank=not self._need_targets, trim=self._trim)
        return Pair(source_text, usable_text(target, "target") if self._need_targets else None, origin)


def _format(source: Source, settings: ReadingSettings, *, need_targets: bool) -> Format:
    """The format that the settings name, else that of the file's name, else that of its content.

    Raises:
        InvalidData: none of them tells.
    """
    if settings.format is not None:
        return settings.format
    path = PurePath(source.name.lower())
    by_name = _SUFFIXES.get((path.with_suffix("") if path.suffix == ".gz" else path).suffix)
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

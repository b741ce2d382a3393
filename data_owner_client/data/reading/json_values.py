"""JSON objects of a file: one a line, or values that span lines, such as an array of objects."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from data_owner_client.data.reading.files import MAX_LINE, Source
from data_owner_client.data.reading.problems import InvalidText, require_decoded
from protocol.errors import InvalidData

Record = dict[str, Any]
_CHUNK = 2**16
# Characters of a record between other documents; longer objects hold records.
_LONGEST_RECORD = 2**20
# Digits of an integer that stays one.
_LONG_INTEGER = 1000
_SPACE = " \t\r\n"
# An object or array begins so, unlike texts as in "{name} is here" and "[1] See below".
_BEGINNING = re.compile(r'\{\s*(["}]|$)|\[\s*([\[{"\]]|$)')
_BYTE_ORDER_MARK = "\ufeff"


class RepeatedKeys(Record):
    """A JSON object that has a key twice, so that nobody knows which value is meant."""


def _object(items: list[tuple[str, Any]]) -> Record:
    record = dict(items)
    return record if len(record) == len(items) else RepeatedKeys(record)


def _integer(digits: str) -> int | float:
    """The number. Integers of thousands of digits, which `int` refuses, are no error in a field that nobody reads."""
    return int(digits) if len(digits) < _LONG_INTEGER else float(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


def json_lines(source: Source) -> Iterator[tuple[int, Record | InvalidText]]:
    """Line number and object of each line that is not blank, or what is wrong with it."""
    for number, line in source.lines():
        # Files that were put together have byte-order marks inside.
        text = line.strip(_BYTE_ORDER_MARK + _SPACE)
        if not text:
            continue
        try:
            require_decoded(text)
            yield number, _record(_DECODER.decode(text))
        except InvalidText as problem:
            yield number, problem
        except RecursionError:
            yield number, InvalidText("JSON that is nested too deeply", hint="Give plain objects with texts.")
        except ValueError:
            yield number, InvalidText("no JSON", hint="JSON lines have one object a line; else say --format json.")


def is_json(head: str) -> bool:
    """Return True if a text seems to begin with a JSON object or array."""
    first = _first_line(head)
    if _BEGINNING.match(first) is None:
        return False
    return first in ("{", "[", "[{") or "\n" not in head.strip() or _is_json(first)


def is_json_lines(head: str) -> bool:
    """Return True if the first line of a JSON text is a whole object, and another line follows."""
    first = _first_line(head)
    return first.startswith("{") and "\n" in head.strip() and _is_json(first)


def json_values(
    source: Source, has_record_keys: Callable[[Record], bool]
) -> Iterator[tuple[int, Record | InvalidText]]:
    """Line number and object of each record of a JSON document.

    Records are the objects of an array, or of the list of objects that an object has, or the object itself. Several
    documents may follow each other.

    Args:
        source: the file.
        has_record_keys: tells a record that has a list of objects from an object that holds the records.

    Raises:
        InvalidData: the document is not well-formed, or an object has several lists of objects.
    """
    return _Document(source, has_record_keys).records()


class _Decoded(NamedTuple):
    """A JSON value with the number of its first line and its text."""

    number: int
    value: Any
    text: str


class _Document:
    """A JSON document, of which one record at a time is in memory."""

    def __init__(self, source: Source, has_record_keys: Callable[[Record], bool]) -> None:
        self._source = source
        self._has_record_keys = has_record_keys
        self._buffer = ""
        self._at = 0
        self._counted = 0
        self._line = 1

    def records(self) -> Iterator[tuple[int, Record | InvalidText]]:
        while begin := self._next():
            if begin == "[":
                yield from self._elements()
            elif begin == "{" and not self._begins_record():
                yield from self._object()
            else:
                yield self._value()

    def _elements(self) -> Iterator[tuple[int, Record | InvalidText]]:
        self._take("[")
        closed = self._next() == "]" and self._take("]") == "]"
        while not closed:
            yield self._value()
            closed = self._take(",]") == "]"

    def _object(self) -> Iterator[tuple[int, Record | InvalidText]]:
        """The records in the list of the object, or the object itself if it has no list of objects."""
        number, members, lists = self._number(), list[tuple[str, Any]](), list[str]()
        self._take("{")
        closed = self._next() == "}" and self._take("}") == "}"
        while not closed:
            key = self._decoded().value
            if not isinstance(key, str):
                raise self._malformed()
            self._take(":")
            if self._next() == "[" and self._holds_objects():
                lists.append(key)
                if len(lists) > 1:
                    names = " and ".join(map(repr, lists))
                    raise InvalidData(
                        f"{self._source.name} has several lists of objects, {names}.", hint="Give each its own file."
                    )
                yield from self._elements()
            else:
                members.append((key, self._decoded().value))
            closed = self._take(",}") == "}"
        if not lists:
            yield number, _object(members)

    def _begins_record(self) -> bool:
        """Return True if the object that begins here is a record, and not too long to look at it."""
        while True:
            try:
                record, _ = _DECODER.raw_decode(self._buffer, self._at)
            except RecursionError:
                return False
            except ValueError:
                if len(self._buffer) - self._at > _LONGEST_RECORD or not self._fill():
                    return False
            else:
                return self._has_record_keys(record) or not any(map(_is_list_of_objects, record.values()))

    def _holds_objects(self) -> bool:
        """Return True if the list that begins here holds objects."""
        while not self._buffer[self._at + 1 :].lstrip(_SPACE) and self._fill():
            pass
        return self._buffer[self._at + 1 :].lstrip(_SPACE).startswith("{")

    def _value(self) -> tuple[int, Record | InvalidText]:
        decoded = self._decoded()
        try:
            require_decoded(decoded.text)
            return decoded.number, _record(decoded.value)
        except InvalidText as problem:
            return decoded.number, problem

    def _decoded(self) -> _Decoded:
        self._next()
        number = self._number()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._at)
            except RecursionError as error:
                raise InvalidData(
                    f"{self._source.name}:{number} has JSON that is nested too deeply.",
                    hint="Give plain objects with texts.",
                ) from error
            except ValueError as error:
                # Perhaps it goes on in what has not been read.
                if len(self._buffer) - self._at > MAX_LINE or not self._fill():
                    raise self._malformed() from error
            else:
                # A number may go on, too.
                if end < len(self._buffer) or not self._fill():
                    begin, self._at = self._at, end
                    return _Decoded(number, value, self._buffer[begin:end])

    def _next(self) -> str:
        """The next character that is no space; "" at the end. Everything before it is forgotten."""
        while True:
            while self._at < len(self._buffer) and self._buffer[self._at] in _SPACE + _BYTE_ORDER_MARK:
                self._at += 1
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._fill():
                return ""

    def _take(self, allowed: str) -> str:
        begin = self._next()
        if not begin or begin not in allowed:
            raise self._malformed()
        self._at += 1
        return begin

    def _fill(self) -> bool:
        """Read as much again as is in memory, at least a chunk; return False at the end."""
        self._number()
        self._buffer, self._at = self._buffer[self._at :], 0
        self._counted = 0
        more = self._source.read(max(_CHUNK, len(self._buffer)))
        self._buffer += more
        return bool(more)

    def _number(self) -> int:
        self._line += self._buffer.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def _malformed(self) -> InvalidData:
        where = f"{self._source.name}:{self._number()}"
        return InvalidData(
            f"{where} is not well-formed JSON.", hint="Say --format jsonl for JSON lines, or text for texts."
        )


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _record(value: object) -> Record | InvalidText:
    if isinstance(value, dict):
        return value
    return InvalidText("no JSON object", hint='For example {"source": "…", "target": "…"}.')


def _first_line(head: str) -> str:
    return head.lstrip(_BYTE_ORDER_MARK + _SPACE).split("\n")[0].strip()


def _is_json(text: str) -> bool:
    try:
        _DECODER.decode(text)
    except (ValueError, RecursionError):
        return False
    return True

"""Answers with fields, as JSON or as slots, and the one form in which an adapter learns them.

Slots are `key: value` or `key = value` parts, between semicolons or newlines. Their values are texts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping

from pydantic import JsonValue

ITEM_SEPARATOR, KEY_SEPARATOR = ", ", ": "
"""Separators of items, and of keys and values, in JSON that an adapter learns: one line, as most JSON on pages has."""

# Up to here, every integer is a float64.
_EXACT_INTEGERS = 2**53

_FENCE = re.compile(r"\s*```\w*[ \t]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL)
_SLOT = re.compile(r"([^:=\s{\[\"'`][^:=]*)[:=](.*)", re.DOTALL)


class RepeatedKey(ValueError):
    """An object that has a key twice, so that nobody knows which value is meant."""


def parse_json(text: str, *, unique_keys: bool = False) -> JsonValue:
    """The value of a JSON text; whole numbers are integers, however they are written.

    Args:
        text: the text.
        unique_keys: refuse objects that have a key twice; otherwise its last value counts.

    Raises:
        RepeatedKey: an object has a key twice, and may not.
        ValueError: it is no JSON, has a number outside of float64, or nests too deep.
    """
    pairs_hook = _object if unique_keys else None
    try:
        value: JsonValue = json.loads(text, parse_constant=_number, parse_float=_number, object_pairs_hook=pairs_hook)
    except RecursionError as error:
        raise ValueError("it nests too deep") from error
    return value


def parse_slots(text: str) -> dict[str, JsonValue]:
    """The fields of slots; those with several values have a list.

    Raises:
        ValueError: a part has no key, or there is no part.
    """
    fields: dict[str, list[JsonValue]] = {}
    for part in filter(None, map(str.strip, re.split(r"[;\n]", text))):
        slot = _SLOT.fullmatch(part)
        if slot is None:
            raise ValueError("a part has no key")
        fields.setdefault(slot[1].strip(), []).append(slot[2].strip())
    if not fields:
        raise ValueError("there are no slots")
    return {key: values[0] if len(values) == 1 else values for key, values in fields.items()}


def without_fence(text: str) -> str:
    """The text inside a Markdown code fence; the text itself without one."""
    fenced = _FENCE.fullmatch(text)
    return fenced[1] if fenced else text


def json_line(value: JsonValue) -> str:
    """A JSON value in the form that an adapter learns, in one line."""
    line = json.dumps(value, ensure_ascii=False, separators=(ITEM_SEPARATOR, KEY_SEPARATOR))
    return line.replace("\x7f", "\\u007f")  # as decoding that is held to a schema writes it


def slots_line(fields: Mapping[str, JsonValue]) -> str:
    """The fields of slots in the form that an adapter learns, in one line."""
    parts = [(key, values if isinstance(values, list) else [values]) for key, values in fields.items()]
    return "; ".join(f"{key}: {value}" for key, values in parts for value in values)


def _object(items: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    fields = dict(items)
    if len(fields) < len(items):
        raise RepeatedKey("an object has a key twice")
    return fields


def _number(spelling: str) -> float:
    """The number; an integer where it is whole, as decoding that is held to a schema writes it."""
    number = float(spelling)
    if not math.isfinite(number):
        raise ValueError(f"{spelling} is no number of JSON, or too large")
    return int(number) if number.is_integer() and abs(number) < _EXACT_INTEGERS else number

"""Fields of structured answers, for comparing them."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue

from data_owner_client.data.structured_answers import parse_json, parse_slots, without_fence

Leaf = tuple[str, Hashable]
"""Path and normalised value of a scalar, or of an empty object or array."""


@dataclass(frozen=True)
class ParsedAnswer:
    """A structured answer.

    Attributes:
        form: JSON or slots; None for other text.
        strict: whether the whole answer is of this form, without a code fence.
        value: its value; None also for other text.
        identity: what equal answers have in common: values of JSON, with objects and arrays in any order.
        leaves: how often it has each leaf.
    """

    form: Literal["json", "slots"] | None
    strict: bool
    value: JsonValue
    identity: Hashable
    leaves: Counter[Leaf]

    @property
    def paths(self) -> set[str]:
        """The paths of its leaves."""
        return {path for path, _ in self.leaves}


def parse_answer(text: str) -> ParsedAnswer:
    """The fields of an answer: of JSON, of JSON in a code fence, or else of slots."""
    inner = without_fence(text)
    with suppress(ValueError, RecursionError):
        value = parse_json(inner)
        return ParsedAnswer("json", inner == text, value, _identity(value), Counter(_leaves(value)))
    with suppress(ValueError):
        fields = parse_slots(inner)
        return ParsedAnswer("slots", inner == text, fields, _identity(fields), Counter(_leaves(fields)))
    return ParsedAnswer(None, False, None, text, Counter())


def _identity(value: JsonValue) -> Hashable:
    """A hashable value that is equal for equal JSON values: 1 is 1.0, true is not 1, arrays are multisets."""
    if isinstance(value, dict):
        return "object", frozenset((key, _identity(item)) for key, item in value.items())
    if isinstance(value, list):
        return "array", frozenset(Counter(map(_identity, value)).items())
    return (isinstance(value, bool), value)


def _leaves(value: JsonValue, path: str = "") -> Iterator[Leaf]:
    """The scalars, empty objects and empty arrays of a value; items of arrays share the path of the array and []."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for item in value:
            yield from _leaves(item, f"{path}[]")
    else:
        yield path, _identity(_normalised(value) if isinstance(value, str) else value)


def _normalised(text: str) -> str:
    """The text without differences of case, of spaces, and of Unicode forms."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())

r"""The form of an answer that decoding is held to: JSON by a schema, or one of several choices.

JSON is written as `json.dumps(…, ensure_ascii=False)` writes it: `", "` and `": "` between its parts, no line breaks,
characters as they are. The keys of an object come in the order of the schema's `properties`, then any others.

Limits, which come from the library: whole numbers of an enumeration have no fraction (`1`, not `1.0`), integers no
exponent, and the character U+007F is written as `\u007f`. `data.structured_answers.json_line` writes answers like this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from pydantic import JsonValue

from protocol.errors import InvalidData

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_SEPARATORS = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False, "lenient": False}
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties")
_LIBRARY_PREFIX = "failed to compile JSON schema: "


@dataclass(frozen=True)
class AnswerForm:
    """The form of an answer.

    Attributes:
        schema: JSON schema that an answer obeys; an empty one for any JSON. None for `choices`.
        choices: texts of which an answer is one; without a schema.
    """

    schema: Mapping[str, JsonValue] | None = None
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.schema is None) == (not self.choices) or "" in self.choices:
            raise InvalidData(
                "The form of an answer is a JSON schema, or choices that are not empty.", hint="Give one of them."
            )

    @property
    def spelling(self) -> set[str]:
        """Characters without which no answer of this form can be written."""
        if self.schema is None:
            return set("".join(self.choices))
        written = {'{}[]",: -.0123456789truefalsn\\'}
        for part in _parts(self.schema):
            names = (part.get(key) for key in ("properties", "required", "const", "enum"))
            written.update(json.dumps(value, ensure_ascii=False) for value in names if value is not None)
        return set("".join(written))

    def require_supported(self) -> None:
        """Require a schema that decoding can be held to.

        Raises:
            InvalidData: it cannot; the message names the feature.
        """
        from llguidance import LLMatcher

        for part in _parts(self.schema or {}):
            if feature := _inexact_feature(part):
                raise InvalidData(
                    f"Decoding cannot be held to the answers' schema: {feature}.",
                    hint="Leave this part out of the schema; docs/data-owner-guide.md lists what can be in it.",
                )
        error = LLMatcher.validate_grammar(self.grammar(()))
        if error:
            raise InvalidData(
                f"Decoding cannot be held to the answers' schema: {_reason(error)}.",
                hint="Leave this part out of the schema; docs/data-owner-guide.md lists what can be in it.",
            )

    def grammar(self, stops: Sequence[str]) -> str:
        """The grammar of an answer and the stop behind it, for llguidance.

        A space before and behind the answer is allowed, and anything behind the stop, as the last token may go on.

        Args:
            stops: stop texts; none if only special tokens end the answer.

        Raises:
            InvalidData: a stop could stand inside an answer.
        """
        self.require_outside(stops)
        tail = f"/ ?(({'|'.join(map(_literal, stops))})(?s:.*))?/" if stops else r"/[ \n]?/"
        if self.schema is None:
            answer = f"/{'|'.join(map(_literal, self.choices))}/"
        else:
            answer = f"%json {json.dumps({**_expanded(self.schema), 'x-guidance': _SEPARATORS})}"
        # Without forcing, every division of a text into tokens is allowed, as it is in free decoding.
        return f'%llguidance {{"no_forcing": true}}\nstart: / ?/ answer {tail}\nanswer: {answer}'

    def unwritable_part(self, answer: str) -> str:
        """The end of an answer, from the first character that decoding could not write; empty if it can write all.

        Of a form that decoding cannot be held to, every answer can be written.
        """
        tokenizer, matcher = _byte_matcher(self.grammar(()))
        if matcher.is_error():
            return ""
        written = matcher.deep_copy().validate_tokens(tokenizer.tokenize_str(f"{answer}\n"))
        return answer.encode()[written:].decode(errors="replace")

    def require_outside(self, stops: Sequence[str]) -> None:
        """Require stops that cannot stand inside an answer.

        Raises:
            InvalidData: one can.
        """
        for stop in stops:
            # JSON escapes control characters, so no text that contains one can stand inside it.
            if self.schema is not None and min(stop) >= " ":
                raise InvalidData(
                    f"The stop {stop!r} can stand inside JSON, and would end an answer before it is whole.",
                    hint="Leave it away (the default is a newline), or decode with --no-hold.",
                )
            for choice in self.choices:
                if f" {choice}{stop}".index(stop) <= len(choice):
                    raise InvalidData(
                        f"The stop {stop!r} would end the choice {choice!r} before it is whole.",
                        hint="Give another stop.",
                    )


@lru_cache(maxsize=16)
def _byte_matcher(grammar: str) -> tuple[LLTokenizer, LLMatcher]:
    """A tokenizer of bytes, and a matcher of its tokens at the beginning of an answer."""
    from llguidance import LLMatcher, LLTokenizer

    tokenizer = LLTokenizer("byte")
    return tokenizer, LLMatcher(tokenizer, grammar)


def _reason(error: str) -> str:
    """The library's reason in one line, without an option that nobody can set here."""
    first, *further = error.split(_LIBRARY_PREFIX)[-1].splitlines()
    if "coerce_one_of" in first:
        return "the forms of a oneOf do not exclude each other; anyOf takes such"
    # Regular expressions are drawn over several lines, and the reason stands behind.
    reasons = [line.removeprefix("error: ") for line in further if line.startswith("error: ")]
    return " ".join([first, *reasons[:1]]).rstrip(".")


def _inexact_feature(part: Mapping[str, JsonValue]) -> str | None:
    """The feature of a schema that the library reads in another way; None if there is none."""
    least, required = part.get("minProperties"), part.get("required")
    # It counts a key as often as it is repeated.
    if isinstance(least, int) and least > max(1, len(required) if isinstance(required, list) else 0):
        return f"minProperties is {least}, and fewer keys are required"
    spelling = json.dumps([part.get("properties"), part.get("enum"), part.get("const")], ensure_ascii=False)
    if "\x7f" in spelling:
        return "U+007F is in a key or an enumeration"
    if any(isinstance(each, float) and "e" in repr(each) for each in _scalars([part.get("enum"), part.get("const")])):
        return "a number of an enumeration has an exponent"
    return None


def _scalars(value: JsonValue) -> list[JsonValue]:
    if isinstance(value, dict):
        value = [*value.values()]
    return [scalar for part in value for scalar in _scalars(part)] if isinstance(value, list) else [value]


def _literal(text: str) -> str:
    """A regular expression that matches a text."""
    return "".join(f"\\x{{{ord(character):x}}}" for character in text)


def _parts(schema: JsonValue | Mapping[str, JsonValue]) -> list[Mapping[str, JsonValue]]:
    """A schema and all objects in it."""
    if isinstance(schema, Mapping):
        return [schema, *(part for value in schema.values() for part in _parts(value))]
    return [part for value in schema for part in _parts(value)] if isinstance(schema, list) else []


def _expanded(schema: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """The schema with schemas for the objects and arrays of its enumerations, whose keys the library would sort."""
    expanded: dict[str, JsonValue] = {}
    further: list[JsonValue] = []
    for key, value in schema.items():
        if key == "const" and isinstance(value, (dict, list)):
            further.append(_equal_to(value))
        elif key == "enum" and isinstance(value, list) and any(isinstance(each, (dict, list)) for each in value):
            further.append({"anyOf": [_equal_to(each) for each in value]})
        elif key in _SCHEMAS_BY_NAME and isinstance(value, dict):
            expanded[key] = {name: _expanded_part(part) for name, part in value.items()}
        elif key in _SCHEMA_LISTS and isinstance(value, list):
            expanded[key] = [_expanded_part(part) for part in value]
        elif key in _SCHEMAS:
            expanded[key] = _expanded_part(value)
        else:
            expanded[key] = value
    if further:
        whole = expanded.get("allOf")
        expanded["allOf"] = [*(whole if isinstance(whole, list) else []), *further]
    return expanded


def _expanded_part(schema: JsonValue) -> JsonValue:
    return _expanded(schema) if isinstance(schema, dict) else schema


def _equal_to(value: JsonValue) -> JsonValue:
    """A schema of one value, its keys in their order."""
    if isinstance(value, dict):
        parts = {name: _equal_to(part) for name, part in value.items()}
        return {"type": "object", "properties": parts, "required": [*value], "additionalProperties": False}
    if isinstance(value, list):
        return {"type": "array", "prefixItems": [*map(_equal_to, value)], "items": False, "minItems": len(value)}
    return {"const": value}

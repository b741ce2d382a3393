"""JSON schemas of answers: whether a value obeys, and the order of its keys."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

Schema = Mapping[str, JsonValue]
# Those that restrict no value by themselves.
_KEYWORDS = {"$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "examples"}


class AnswerSchema:
    """A JSON schema of answers. Nothing is fetched: references lead to places in the schema itself.

    Args:
        schema: the JSON schema; of the draft that its `$schema` names, or else 2020-12.

    Raises:
        ValueError: it is no JSON schema, or a reference leads to no place in it.
    """

    def __init__(self, schema: Schema) -> None:
        from jsonschema import Draft202012Validator, SchemaError  # slow to import
        from jsonschema.validators import validator_for
        from referencing import Registry
        from referencing.exceptions import Unresolvable
        from referencing.jsonschema import DRAFT202012

        self.schema = schema
        kind = validator_for(schema, default=Draft202012Validator)
        try:
            kind.check_schema(dict(schema))
        except SchemaError as error:
            raise ValueError(f"it is no JSON schema: {error.message} at {error.json_path}") from error
        if schema and not _KEYWORDS.union(kind.VALIDATORS).intersection(schema):
            raise ValueError(f"it is no JSON schema: {', '.join(schema)} are none of its keywords, such as type")
        self._validator: Validator = kind(dict(schema), registry=Registry())
        resource = DRAFT202012.create_resource(dict(schema))
        self._resolver = Registry().with_resource("", resource).resolver()
        for reference in _references(schema):
            try:
                self._target(reference)
            except Unresolvable as error:
                raise ValueError(f"$ref {reference!r} leads to no place in it; write #/$defs/NAME") from error

    def violation(self, value: JsonValue) -> str | None:
        """Place and keyword that a value violates, such as `$.intent (enum)`; None for a valid value."""
        from jsonschema.exceptions import best_match  # slow to import

        try:
            error = best_match(self._validator.iter_errors(value))
        except RecursionError:
            return "its depth"
        return f"{error.json_path} ({error.validator})" if error else None

    def ordered(self, value: JsonValue) -> JsonValue:
        """A valid value with the keys of objects in the order of the schema's `properties`; other keys follow."""
        return self._ordered(value, [dict(self.schema)])

    def _ordered(self, value: JsonValue, schemas: Sequence[JsonValue]) -> JsonValue:
        parts = [part for schema in schemas for part in self._parts(schema, value)]
        if isinstance(value, dict):
            listed = dict.fromkeys(key for part in parts for key in _mapping(part, "properties") if key in value)
            return {key: self._ordered(value[key], _of_key(parts, key)) for key in {**listed, **value}}
        if isinstance(value, list):
            return [self._ordered(item, _of_item(parts, place)) for place, item in enumerate(value)]
        return value

    def _parts(self, schema: JsonValue, value: JsonValue) -> Iterator[Schema]:
        """The schema and those that it applies to the value in the same place."""
        if not isinstance(schema, dict):
            return
        yield schema
        if isinstance(schema.get("$ref"), str):
            yield from self._parts(self._target(str(schema["$ref"])), value)
        for part in _list(schema, "allOf"):
            yield from self._parts(part, value)
        for keyword in ("anyOf", "oneOf"):
            valid = (part for part in _list(schema, keyword) if self._validator.evolve(schema=part).is_valid(value))
            yield from self._parts(next(valid, None), value)

    def _target(self, reference: str) -> Any:
        return self._resolver.lookup(reference).contents


def answer_schema(schema: Schema) -> AnswerSchema:
    """The schema, ready to check answers; equal ones are prepared once.

    Raises:
        ValueError: as `AnswerSchema`.
    """
    return _prepared(json.dumps(schema))


@lru_cache(maxsize=16)
def _prepared(schema: str) -> AnswerSchema:
    return AnswerSchema(json.loads(schema))


def _references(schema: Any) -> Iterator[str]:
    """Every `$ref` of a schema."""
    if isinstance(schema, Mapping):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        for part in schema.values():
            yield from _references(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from _references(part)


def _of_key(parts: Sequence[Schema], key: str) -> list[JsonValue]:
    """The schemas of an object's key."""
    return [
        properties[key] if key in properties else part.get("additionalProperties")
        for part in parts
        for properties in [_mapping(part, "properties")]
    ]


def _of_item(parts: Sequence[Schema], place: int) -> list[JsonValue]:
    """The schemas of an array's item."""
    return [
        prefix[place] if place < len(prefix) else part.get("items")
        for part in parts
        for prefix in [_list(part, "prefixItems")]
    ]


def _mapping(schema: Schema, keyword: str) -> dict[str, JsonValue]:
    value = schema.get(keyword)
    return value if isinstance(value, dict) else {}


def _list(schema: Schema, keyword: str) -> list[JsonValue]:
    value = schema.get(keyword)
    return value if isinstance(value, list) else []

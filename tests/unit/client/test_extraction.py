"""Scores of structured answers, with expectations by hand, jsonschema, and properties that must hold."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from data_owner_client.data.answer_schema import answer_schema
from data_owner_client.data.structured_answers import json_line, parse_json, parse_slots, slots_line
from data_owner_client.scoring.extraction import ExtractionScorer
from data_owner_client.scoring.json_fields import parse_answer
from protocol.errors import InvalidData
from tests.profiles import scaled

SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([1.0, 0.5]) | st.text('aB é\n"', max_size=3)
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "c": {"type": "integer"},
        "b": {"$ref": "#/$defs/inner"},
        "a": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"$ref": "#/$defs/inner"}}]},
    },
    "$defs": {"inner": {"properties": {"b": {"enum": ["a", "B", 1]}, "a": True}, "required": ["b"]}},
}


def _scores(reference: str, answer: str) -> dict[str, float]:
    return ExtractionScorer([(reference,)]).scores([answer])


@pytest.mark.parametrize(
    ("reference", "answer", "exact"),
    [
        ('{"a": 1, "b": [1, 2]}', '{"b":[2.0,1],"a":1e0}', True),
        ('{"a": 1}', '{"a": true}', False),
        ('{"a": 1}', '{"a": "1"}', False),
        ('{"a": null}', "{}", False),
        ('{"a": []}', '{"a": {}}', False),
        ('{"a": [1, 1]}', '{"a": [1]}', False),
        ('{"a": "Lamp"}', '{"a": "lamp"}', False),
        ('"x"', '"x"', True),
        ('{"a": 1}', '```json\n{"a": 1}\n```', True),
        ('{"a": 1}', 'Here it is: {"a": 1}', False),
        ("name: lamp; color: red", "color = red\nname = lamp", True),
        ("name: lamp; name: door", "name: door; name: lamp", True),
        ('{"name": "lamp"}', "name: lamp", True),
    ],
)
def test_exact_is_equality_of_json_values(reference: str, answer: str, exact: bool) -> None:
    assert _scores(reference, answer)["exact"] == 100 * exact


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        ('{"c": 1}', True),
        ('  {"c": 1}\n', True),
        ('{"c": "1"}', False),
        ('{"b": {}}', False),
        ('```\n{"c": 1}\n```', False),
        ("c: 1", False),
        ('{"c": 1', False),
        ('{"c": NaN}', False),
        ("[" * 100_000, False),
        ("9" * 5_000, False),
    ],
)
def test_valid_answers_parse_strictly_and_obey_the_schema(answer: str, valid: bool) -> None:
    assert ExtractionScorer([('{"c": 1}',)], SCHEMA).scores([answer])["valid"] == 100 * valid


def test_f1_counts_leaves_of_all_texts_together() -> None:
    references = [
        '{"intent": "on", "slots": {"name": "desk lamp", "color": "red"}}',
        '{"intent": "off", "tags": ["x", "y"]}',
    ]
    answers = ['{"intent": "on", "slots": {"name": "Desk  Lamp", "level": 3}}', '{"intent": "on", "tags": ["y", "z"]}']
    scorer = ExtractionScorer([(text,) for text in references])
    # Paths: 2 of 3 and 2 of 2 are shared. Leaves: 2 of 3 and 1 of 3.
    assert scorer.scores(answers) == pytest.approx({"exact": 0, "valid": 100, "field_f1": 80, "value_f1": 50})
    assert scorer.each(answers).tolist() == pytest.approx([200 * 2 / 6, 200 * 1 / 6])
    table = {row.field: row for row in scorer.table(answers)}
    assert next(iter(table)) == "intent"
    assert (table["intent"].count, table["intent"].accuracy, table["intent"].f1) == (2, 50, 50)
    assert (table["tags[]"].count, table["tags[]"].accuracy, table["tags[]"].f1) == (1, 0, 50)
    assert (table["slots.color"].count, table["slots.color"].f1) == (1, 0)
    assert table["slots.name"].accuracy == 100


def test_an_unreadable_answer_has_no_fields() -> None:
    assert _scores('{"a": 1}', "I do not know.") == {"exact": 0, "valid": 0, "field_f1": 0, "value_f1": 0}


def test_the_nearest_reference_counts() -> None:
    scorer = ExtractionScorer([('{"a": 1}', '{"a": 2, "b": 3}')])
    assert scorer.scores(['{"b": 3, "a": 2}'])["exact"] == 100
    assert scorer.scores(['{"a": 2}'])["value_f1"] == pytest.approx(200 / 3)


def test_a_reference_without_form_is_refused() -> None:
    with pytest.raises(InvalidData, match="text 2 is neither JSON nor slots"):
        ExtractionScorer([("a: 1",), ("nothing of the kind",)])


@settings(max_examples=scaled(200))
@given(VALUES, VALUES)
def test_equal_values_and_only_those_are_exact(first: Any, second: Any) -> None:
    one, other = parse_answer(json.dumps(first)), parse_answer(json.dumps(second, indent=1))
    # Sorted lists are equal if the multisets are; JSON text tells true from 1, and 1.0 is written as 1.
    assert (one.identity == other.identity) == (_sorted(first) == _sorted(second))


def _sorted(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_sorted(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(sorted(map(_sorted, value))) + "]"
    return json.dumps(int(value) if isinstance(value, float) and value == int(value) else value)


@settings(max_examples=scaled(200))
@given(VALUES)
def test_violations_are_those_of_jsonschema_and_order_changes_no_value(value: Any) -> None:
    schema = answer_schema(SCHEMA)
    valid = Draft202012Validator(SCHEMA).is_valid(value)
    assert (schema.violation(value) is None) == valid
    if valid:
        ordered = schema.ordered(value)
        assert ordered == value
        line = json_line(ordered)
        assert parse_json(line) == value
        assert "\n" not in line
        if isinstance(ordered, dict):
            assert [*ordered] == sorted(ordered, reverse=True)  # as in the schema
            items = ordered.get("a")
            parts = [ordered.get("b"), *(items if isinstance(items, list) else [])]
            inner = [part for part in parts if isinstance(part, dict)]
            assert all(
                [key for key in part if key in "ab"] == sorted({*part} & {*"ab"}, reverse=True) for part in inner
            )


@settings(max_examples=scaled(100))
@given(st.dictionaries(st.text("ab ", min_size=1).filter(str.strip), st.text("x:= y", max_size=5), min_size=1))
def test_slots_survive_their_line(fields: dict[str, str]) -> None:
    cleaned: dict[str, Any] = {key.strip(): value.strip() for key, value in fields.items()}
    assert parse_slots(slots_line(cleaned)) == cleaned


@pytest.mark.parametrize("text", ["", " ; ", "no slot", "a: 1; no slot", '{"a": 1', "'a': 1", "[a: 1]", ": 1"])
def test_other_texts_are_no_slots(text: str) -> None:
    with pytest.raises(ValueError, match=r"slots|key"):
        parse_slots(text)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "objekt"},
        {"properties": {"a": {"$ref": "https://example.com/schema.json"}}},
        {"properties": {"a": {"$ref": "file:///etc/hostname"}}},
        {"properties": {"a": {"$ref": "#/$defs/missing"}}},
    ],
)
def test_schemas_that_cannot_be_followed_are_refused_and_nothing_is_fetched(schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"JSON schema|leads to no place"):
        answer_schema(schema)

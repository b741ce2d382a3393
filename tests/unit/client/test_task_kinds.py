"""Kinds of task: what they fill in, which fields and targets they refuse, and the form of their answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from data_owner_client.data.pairs import Pair
from data_owner_client.data.reading.problems import InvalidText, Origin
from data_owner_client.data.tasks import Task, builtin_tasks, load_task
from data_owner_client.data.tasks.kinds import answer_text
from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.plm.tokenizer import PlmTokenizer
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import InvalidData
from tests.profiles import scaled

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"intent": {"enum": ["on", "off"]}, "level": {"type": "number"}},
    "required": ["intent"],
}

NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text("aé\n\x7f\u2028"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("xy\n", max_size=2), inner, max_size=3),
)


@pytest.fixture(scope="module")
def tokenizer(tiny_service: PlmService) -> PlmTokenizer:
    return RemotePlm(InProcessConnection(tiny_service), cache=None).tokenizer


def _task(**fields: Any) -> Task:
    return Task.model_validate({"name": "t", **fields})


def _target(task: Task, target: str, tokenizer: PlmTokenizer) -> str:
    return task.prompt_and_target(Pair("a", target), tokenizer)[1].text


def test_every_kind_has_a_built_in_task() -> None:
    tasks = {name: load_task(name) for name in builtin_tasks()}
    assert {task.kind for task in tasks.values()} == {"rewrite", "classify", "extract", "answer", "summarise", "chat"}
    assert [task.name for task in tasks.values()] == [*tasks]


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, "Source: a\nTarget:"),
        ({"kind": "classify"}, "Choose the label of the text.\n\nText: a\nLabel:"),
        ({"kind": "classify", "labels": ["x", "y"]}, "Choose the label of the text: x, y.\n\nText: a\nLabel:"),
        ({"kind": "classify", "labels": [*"abcdefghijklmnopqrstu"], "instruction": ""}, "Text: a\nLabel:"),
        (
            {"kind": "classify", "labels": [*"abcdefghijklmnopqrstu"]},
            "Choose the label of the text.\n\nText: a\nLabel:",
        ),
        ({"kind": "extract"}, "Extract the fields of the text. Write JSON in one line.\n\nText: a\nJSON:"),
        (
            {"kind": "extract", "answer_schema": SCHEMA, "target_label": "Frame"},
            "Extract the fields of the text: intent, level. Write JSON in one line.\n\nText: a\nFrame:",
        ),
        ({"kind": "answer"}, "Answer the question.\n\nQuestion: a\nAnswer:"),
        ({"kind": "summarise", "source_label": "Page"}, "Summarise the text.\n\nPage: a\nSummary:"),
    ],
)
def test_a_kind_fills_in_what_a_task_leaves_open(fields: dict[str, Any], prompt: str, tokenizer: PlmTokenizer) -> None:
    task = _task(**fields)
    assert task.prompt("a", tokenizer).text == prompt
    # As adapters store it, and as the settings of an older task: whole, or without kinds.
    assert Task.model_validate_json(task.model_dump_json()) == task


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": ["a", "b"]}, 'labels need kind = "classify"'),
        ({"kind": "extract", "labels": ["a", "b"]}, 'labels need kind = "classify"'),
        ({"kind": "classify", "labels": ["a"]}, "labels has one label"),
        ({"kind": "classify", "labels": ["a", ""]}, "the label '' is empty"),
        ({"kind": "classify", "labels": ["a", " b"]}, "the label ' b' is empty, or has spaces"),
        ({"kind": "classify", "labels": ["a", "b", "a"]}, "labels has 'a' 2 times"),
        ({"kind": "classify", "labels": ["a", "b\nc"]}, r"the label 'b\\nc' contains the stop"),
        ({"kind": "classify", "labels": ["a", "b##c"], "stop": "##"}, "contains the stop '##'"),
        ({"kind": "classify", "labels": ["a", "b#"], "stop": "##"}, "or ends with a part of it"),
        ({"kind": "answer", "answer_schema": {}}, 'answer_schema needs kind = "extract"'),
        ({"kind": "extract", "answer_schema": {"type": "objekt"}}, "answer_schema: it is no JSON schema: 'objekt'"),
        ({"kind": "extract", "answer_schema": {"$ref": "#/$defs/x"}}, r"answer_schema: \$ref '#/\$defs/x' leads"),
        # The envelope of OpenAI's structured outputs would allow any JSON.
        ({"kind": "extract", "answer_schema": {"name": "x", "schema": {}}}, "name, schema are none of its keywords"),
        ({"kind": "translate"}, "kind"),
        ({"kind": ["classify"]}, "kind"),
        ({"kind": "classify", "labels": 3}, "labels"),
        ({"kind": "extract", "answer_schema": {"properties": 3}}, "answer_schema"),
    ],
)
def test_fields_that_a_kind_cannot_use_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _task(**fields)


def test_labels_may_begin_with_each_other(tokenizer: PlmTokenizer) -> None:
    task = _task(kind="classify", labels=["on", "on off"])
    assert _target(task, "on", tokenizer) == " on\n"
    assert _target(task, "on off", tokenizer) == " on off\n"


@pytest.mark.parametrize(
    ("fields", "target", "kind"),
    [
        ({"kind": "classify", "labels": ["on", "off"]}, "of", "a label that the task does not have"),
        ({"kind": "extract"}, "I do not know.", "a target that is neither JSON nor slots"),
        ({"kind": "extract"}, '{"intent": NaN}', "a target that is neither JSON nor slots"),
        ({"kind": "extract"}, '```json\n{"intent": 1}\n```', "a target that is neither JSON nor slots"),
        ({"kind": "extract"}, r'{"intent": "\ud800"}', "half of a surrogate pair in the target"),
        ({"kind": "extract", "answer_schema": {}}, '{"a": ' * 700 + "1" + "}" * 700, "a target that nests too deep"),
        ({"kind": "extract"}, '{"x": [{"a": 1, "a": 2}]}', "a target that has a key twice"),
        ({"kind": "extract", "answer_schema": SCHEMA}, "intent: on", "a target that is no JSON"),
        (
            {"kind": "extract", "answer_schema": {"properties": {"day": {"type": "string", "format": "date"}}}},
            '{"day": "2024-02-30"}',
            "a target that decoding cannot be held to",
        ),
        (
            {"kind": "extract", "answer_schema": SCHEMA},
            '{"intent": "of"}',
            "a target that violates the answer_schema at $.intent (enum)",
        ),
        (
            {"kind": "extract", "answer_schema": SCHEMA},
            "{}",
            "a target that violates the answer_schema at $ (required)",
        ),
    ],
)
@pytest.mark.parametrize("form", ["plain", "chat"])
def test_targets_that_are_no_answer_are_named_with_their_place(
    fields: dict[str, Any], target: str, kind: str, form: str, tokenizer: PlmTokenizer
) -> None:
    pair = Pair("a", target, origin=Origin("pairs.jsonl", 7))
    with pytest.raises(InvalidText) as caught:
        _task(**fields, format=form).prompt_and_target(pair, tokenizer)
    assert caught.value.kind == kind
    assert str(caught.value).startswith("pairs.jsonl:7 has ")


@pytest.mark.parametrize(
    ("schema", "target", "answer"),
    [
        (SCHEMA, '{\n  "level": 3.0,\n  "intent": "on"\n}', '{"intent": "on", "level": 3}'),
        (SCHEMA, '{"x":{"b":1,"a":2},"intent":"off"}', '{"intent": "off", "x": {"b": 1, "a": 2}}'),
        (None, '{"b":"Stra\\u00dfe\\n","a":[]}', '{"b": "Straße\\n", "a": []}'),
        (None, "name = lamp\ncolor: red", "name: lamp; color: red"),
    ],
)
def test_structured_targets_and_examples_have_one_form(
    schema: dict[str, Any] | None, target: str, answer: str, tokenizer: PlmTokenizer
) -> None:
    task = _task(kind="extract", answer_schema=schema, instruction="", examples=[{"source": "b", "target": target}])
    prompt, marked = task.prompt_and_target(Pair("a", target), tokenizer)
    assert prompt.text == f"Text: b\nJSON: {answer}\nText: a\nJSON:"
    assert marked.text == f" {answer}\n"
    assert task.reference(Pair("a", target), tokenizer) == answer
    chat = task.model_copy(update={"format": "chat"}).prompt("a", tokenizer)
    assert answer in chat.text


@settings(max_examples=scaled(100))
@given(VALUES, st.sampled_from([None, 1, "\t"]))
def test_one_line_keeps_every_value(value: Any, indent: int | str | None) -> None:
    line = answer_text("extract", (), None, json.dumps(value, indent=indent))
    assert json.loads(line) == value
    assert "\n" not in line
    assert answer_text("extract", (), None, line) == line
    assert Draft202012Validator({"const": value}).is_valid(json.loads(line))


@pytest.mark.parametrize("language", ["German", "", "de-", "d"])
def test_languages_have_codes(language: str) -> None:
    with pytest.raises(ValidationError, match="write the code of a language"):
        _task(kind="answer", language=language)
    assert _task(kind="answer", language="pt_BR").language == "pt_BR"


def test_a_schema_may_be_a_file_beside_the_task(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    task = folder / "frames.toml"
    task.write_text('name = "frames"\nkind = "extract"\nanswer_schema = "frames.json"\n')
    with pytest.raises(InvalidData, match=r"answer_schema: .*frames\.json is no readable JSON file"):
        load_task(task)
    (folder / "frames.json").write_text(json.dumps(SCHEMA))
    assert load_task(task).answer_schema == SCHEMA
    (folder / "frames.json").write_text("[1]")
    with pytest.raises(InvalidData, match="answer_schema"):
        load_task(task)
    (folder / "frames.json").write_text('{"type": 3}')
    with pytest.raises(InvalidData, match=r"frames\.toml: answer_schema: it is no JSON schema"):
        load_task(task)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "string", "pattern": "^(?!x)"}, "look-around.* is not supported"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "a oneOf do not exclude each other; anyOf"),
        ({"not": {}}, "not"),
    ],
)
def test_a_schema_that_decoding_cannot_be_held_to_is_refused_with_the_reason(
    schema: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\nkind = "extract"\nanswer_schema = "schema.json"\n')
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    with pytest.raises(InvalidData, match=rf"mine\.toml: .*{reason}") as caught:
        load_task(path)
    assert "\n" not in str(caught.value)


def test_a_stop_that_can_stand_inside_json_is_refused_when_the_task_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\nkind = "extract"\nstop = "}"\nanswer_schema = { type = "object" }\n')
    with pytest.raises(InvalidData, match=r"mine\.toml: The stop '}' can stand inside JSON"):
        load_task(path)


def test_examples_of_a_task_file_are_answers_of_its_kind(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    head = 'name = "mine"\nkind = "classify"\nlabels = ["a", "b"]\n'
    path.write_text(f'{head}[[examples]]\nsource = "x"\ntarget = "c"\n')
    with pytest.raises(InvalidData, match=r"mine\.toml: example 1: .*a label that the task does not have"):
        load_task(path)

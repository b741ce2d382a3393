"""Token masks of answers' forms, against jsonschema and Python's own JSON."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_owner_client.data.answer_form import AnswerForm
from data_owner_client.data.stops import StopMatcher
from data_owner_client.data.structured_answers import json_line
from data_owner_client.data.tasks import load_task
from data_owner_client.decoding.held.grammar import AnswerGrammar
from data_owner_client.plm.tokenizer import PlmTokenizer
from protocol.errors import InvalidData, Unsupported
from tests.held_answers import HELD_KINDS, SCHEMAS, TOKENIZERS, SchemaAndAnswer, closing, eos_of, spell, stops_of
from tests.profiles import scaled
from tests.small_tokenizers import KINDS, bundle

_FREE_TOKENS = 25
_LONGEST = 400


def grammar_of(form: AnswerForm, tokenizer: PlmTokenizer, *stops: str, rows: int = 2) -> AnswerGrammar:
    """The grammar for a model with a few rows that no token has."""
    return AnswerGrammar(form, tokenizer, stops_of(tokenizer, *stops), len(tokenizer.token_bytes) + rows)


def walk(grammar: AnswerGrammar, tokenizer: PlmTokenizer, seed: int) -> list[int]:
    """Tokens of an answer: allowed ones at random, then those that bring it to its end."""
    state, ids, chosen = grammar.begin(), list[int](), random.Random(seed)
    stops = StopMatcher(tokenizer, stops_of(tokenizer, "\n"))
    while True:
        allowed = state.allowed().nonzero()[:, 0].tolist()
        at_random = len(ids) < _FREE_TOKENS
        ids.append(chosen.choice(allowed) if at_random else closing(tokenizer, allowed))
        if stops.ends(ids):
            return ids
        assert len(ids) < _LONGEST, tokenizer.decode_continuation(ids)
        state.append(ids[-1])


@settings(max_examples=scaled(400))
@given(SCHEMAS, st.sampled_from(HELD_KINDS), st.sampled_from([("\n",), ()]), st.integers(0, 2**32))
def test_every_answer_parses_and_obeys_and_every_prefix_can_be_completed(
    schema_and_answer: SchemaAndAnswer, kind: str, stop: tuple[str, ...], seed: int
) -> None:
    schema, tokenizer = schema_and_answer[0], TOKENIZERS[kind]
    ids = walk(grammar_of(AnswerForm(schema), tokenizer, *stop), tokenizer, seed)
    text = StopMatcher(tokenizer, stops_of(tokenizer, "\n")).text(ids)
    assert "\n" not in text
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


@settings(max_examples=scaled(400))
@given(SCHEMAS, st.sampled_from(HELD_KINDS), st.sampled_from(["", " "]), st.integers(0, 2**32))
def test_canonical_answers_are_allowed_in_every_division_into_tokens(
    schema_and_answer: SchemaAndAnswer, kind: str, before: str, seed: int
) -> None:
    schema, answer = schema_and_answer
    tokenizer = TOKENIZERS[kind]
    ids = spell(tokenizer, before + json_line(answer), seed)
    state = grammar_of(AnswerForm(schema), tokenizer, "\n").begin()
    assert state.count_allowed(ids) == len(ids)
    for token in ids:
        assert state.allowed()[token]
        state.append(token)
    allowed_V = state.allowed()
    assert all(allowed_V[end] for end in (eos_of(tokenizer), spell(tokenizer, "\n", seed)[0]))


@settings(max_examples=scaled(100))
@given(SCHEMAS, st.sampled_from(HELD_KINDS), st.data())
def test_masks_along_drafts_are_those_of_the_states_behind_them(
    schema_and_answer: SchemaAndAnswer, kind: str, data: st.DataObject
) -> None:
    schema, answer = schema_and_answer
    tokenizer, line = TOKENIZERS[kind], json_line(answer)
    ids = spell(tokenizer, f" {line}\n", data.draw(st.integers(0, 99)))
    start, wrong = data.draw(st.integers(0, len(ids) - 1)), data.draw(st.integers(0, len(ids)))
    ids = [*ids[:wrong], eos_of(tokenizer), *ids[wrong:]]
    start = min(start, wrong)
    state = grammar_of(AnswerForm(schema), tokenizer, "\n").begin()
    for token in ids[:start]:
        state.append(token)
    before, fork = state.allowed(), state.fork()
    along = state.allowed_along(ids[start:])
    assert torch.equal(state.allowed(), before)
    assert len(along) == len(ids) - start + 1
    for step, allowed_V in enumerate(along):
        assert (allowed_V is None) == (start + step > wrong)
        if allowed_V is not None:
            assert torch.equal(allowed_V, fork.allowed())
            fork.append(ids[start + step])


@pytest.mark.parametrize("kind", HELD_KINDS)
def test_special_tokens_are_no_text_and_rows_without_token_are_never_allowed(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    state = grammar_of(AnswerForm({"type": "string"}), tokenizer, "\n", rows=7).begin()
    for token in spell(tokenizer, ' "<s>', 0):
        state.append(token)
    allowed_V = state.allowed()
    assert not allowed_V[-7:].any()
    assert not allowed_V[[*tokenizer.special_ids.values()]].any()
    # Users may write these, so they are text.
    assert allowed_V[tokenizer.token_bytes.index(b"<think>")]


def test_fewer_rows_than_tokens_allow_those_with_rows() -> None:
    tokenizer = TOKENIZERS["gpt2"]
    state = grammar_of(AnswerForm({"type": "string"}), tokenizer, "\n", rows=-5).begin()
    state.append(spell(tokenizer, '"', 0)[0])
    assert len(state.allowed()) == len(tokenizer.token_bytes) - 5


@pytest.mark.parametrize("kind", ["gpt2", "gemma", "unigram"])
@pytest.mark.parametrize("choices", [("on", "off"), ("a", "ab", "a b"), ("é/€", 'x"{1}', "\\n", "new\nline")])
def test_choices(kind: str, choices: tuple[str, ...]) -> None:
    tokenizer = TOKENIZERS[kind]
    grammar = grammar_of(AnswerForm(choices=choices), tokenizer, "#")
    stops = StopMatcher(tokenizer, stops_of(tokenizer, "#"))
    for choice in choices:
        state, ids = grammar.begin(), spell(tokenizer, f" {choice}#", 3)
        assert state.count_allowed(ids) == len(ids)
        assert state.count_allowed(spell(tokenizer, f" {choice}?", 3)) < len(ids)
        assert stops.text(ids).strip() == choice
    state = grammar.begin()
    assert not state.allowed()[eos_of(tokenizer)]


@pytest.mark.parametrize(
    "text", [' {"a":1}', ' {"a" : 1}', ' {\n"a": 1}', '  {"a": 1}', ' {"a": 1, "b": 2}', ' {"a": 1e0}']
)
def test_other_forms_of_json_are_not_allowed(text: str) -> None:
    tokenizer = TOKENIZERS["gpt2"]
    schema: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
    ids = spell(tokenizer, text, 0)
    assert grammar_of(AnswerForm(schema), tokenizer, "\n").begin().count_allowed(ids) < len(ids)


def test_keys_come_in_the_order_of_the_schema() -> None:
    tokenizer = TOKENIZERS["gpt2"]
    schemas: list[dict[str, Any]] = [
        {"type": "object", "properties": {"z": {}, "a": {}}, "additionalProperties": False},
        {"enum": [{"z": 1, "a": [1]}]},
    ]
    for schema in schemas:
        state = grammar_of(AnswerForm(schema), tokenizer, "\n").begin()
        right, wrong = (spell(tokenizer, text, 0) for text in ('{"z": 1, "a": [1]}', '{"a": [1], "z": 1}'))
        assert state.count_allowed(right) == len(right)
        assert state.count_allowed(wrong) < len(wrong)


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"not": {"type": "string"}}, "not"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"if": {}, "then": {}}, "if"),
    ({"type": "array", "contains": {"type": "string"}}, "contains"),
    ({"properties": {"a": {"dependentRequired": {"a": ["b"]}}}}, "dependentRequired"),
    ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
    ({"type": "string", "format": "colour"}, "colour"),
    ({"$ref": "http://example.org/schema"}, "http://example.org/schema"),
    ({"type": "object", "minProperties": 2}, "minProperties"),
    ({"enum": []}, "Unsatisfiable"),
    ({"properties": {"a\x7f": {}}}, "U.007F"),
    ({"properties": {"a": {"enum": [["\x7f"]]}}}, "U.007F"),
    ({"const": [1e22]}, "exponent"),
]


@pytest.mark.parametrize(("schema", "feature"), UNSUPPORTED)
def test_what_a_schema_cannot_have_is_named(schema: dict[str, Any], feature: str) -> None:
    with pytest.raises(InvalidData, match=feature) as error:
        AnswerForm(schema).require_supported()
    assert "\n" not in str(error.value.detail)


def test_a_task_with_such_a_schema_is_refused_when_it_is_loaded(tmp_path: Any) -> None:
    path = tmp_path / "task.toml"
    path.write_text('name = "t"\nkind = "extract"\n[answer_schema]\ntype = "array"\nuniqueItems = true\n')
    with pytest.raises(InvalidData, match="uniqueItems"):
        load_task(path)


@pytest.mark.parametrize(
    ("form", "stop"),
    [
        (AnswerForm({"type": "string"}), "."),
        (AnswerForm({}), "}"),
        (AnswerForm(choices=("a.b",)), "."),
        (AnswerForm(choices=("a#",)), "##"),
        (AnswerForm(choices=("a",)), " "),
    ],
)
def test_stops_inside_of_answers_are_refused(form: AnswerForm, stop: str) -> None:
    with pytest.raises(InvalidData, match="before it is whole"):
        grammar_of(form, TOKENIZERS["gpt2"], stop)


@pytest.mark.parametrize("arguments", [{}, {"schema": {}, "choices": ("a",)}, {"choices": ("a", "")}])
def test_a_form_is_a_schema_or_choices(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidData, match="schema, or choices"):
        AnswerForm(**arguments)


@pytest.mark.parametrize("kind", ["t5", "bert", "words"])
def test_tokenizers_that_cannot_write_json_are_refused(kind: str) -> None:
    tokenizer = PlmTokenizer(bundle(KINDS[kind]()))
    with pytest.raises(Unsupported, match="no token for"):
        AnswerGrammar(AnswerForm({}), tokenizer, stops_of(tokenizer), len(tokenizer.token_bytes))

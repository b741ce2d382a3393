"""Requests of OpenAI's API: what works, what is ignored, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_owner_client.gateway.openai.bodies import ChatCompletionBody, CompletionBody
from data_owner_client.gateway.openai.errors import EXCEPTION_HANDLERS, ApiError
from data_owner_client.gateway.openai.requests import (
    ChatRequest,
    CompletionRequest,
    GenerationSettings,
    chat_request,
    completion_request,
)

USER = {"role": "user", "content": "Hello"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}


def chat(**fields: Any) -> ChatRequest:
    return chat_request(ChatCompletionBody.model_validate({"messages": [USER], **fields}))


def complete(**fields: Any) -> CompletionRequest:
    return completion_request(CompletionBody.model_validate({"prompt": "Hello", **fields}))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": None, "max_tokens": None, "stop": None, "n": None, "pema": None, "stream_options": None},
        {"stop": [], "tools": [], "tool_choice": "none", "logit_bias": {}, "response_format": {"type": "text"}},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "best_of": 1, "suffix": None},
        {"user": "u", "metadata": {"a": 1}, "store": False, "service_tier": "auto", "reasoning_effort": "low"},
        {"whatever": {"nobody": ["knows"]}, "stream_options": {"include_obfuscation": True}},
    ],
)
def test_what_changes_nothing_is_ignored(fields: dict[str, Any]) -> None:
    assert chat(**fields).settings == GenerationSettings()
    assert complete(**fields).settings == GenerationSettings()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"best_of": 3}, "best_of"),
        ({"n": 2}, "n"),
        ({"stop": ""}, "stop"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"guided_choice": ["a"], "response_format": JSON_SCHEMA}, "guided_choice"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields: dict[str, Any], param: str) -> None:
    for parse in (chat, complete):
        with pytest.raises(ApiError) as caught:
            parse(**fields)
        assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [1, 2], [[1], [2, 3]], ["1", "2"]])
def test_prompts_are_texts_or_ids(prompt: Any) -> None:
    several = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    assert complete(prompt=prompt).prompts == tuple(tuple(p) if isinstance(p, list) else p for p in several)


@pytest.mark.parametrize("prompt", [[], [[]], "", " ", [1, "a"], [True], [-1], {}, [1.5]])
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises((ApiError, ValidationError)):
        complete(prompt=prompt)


def test_the_smaller_length_holds() -> None:
    assert chat(max_tokens=9, max_completion_tokens=5).settings.max_tokens == 5
    assert chat(max_completion_tokens=7).settings.max_tokens == 7
    assert complete(max_tokens=0, echo=True).settings.max_tokens == 0


def test_logprobs_differ_between_the_calls() -> None:
    assert complete(logprobs=0).settings.logprobs == 0
    assert complete(logprobs=False).settings.logprobs is None
    assert chat(logprobs=True).settings.logprobs == 0
    assert chat(logprobs=True, top_logprobs=5).settings.logprobs == 5


def test_parts_are_joined_and_developers_are_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "developer", "content": "s"}, {"role": "user", "content": parts, "id": 1}])
    assert request.conversation.turns == ({"role": "system", "content": "s"}, {"role": "user", "content": "a\nb"})
    assert request.last_user_text == "a\nb"


def test_answers_are_held_to_schemas_and_choices() -> None:
    held = chat(response_format=JSON_SCHEMA).settings.form
    assert held is not None
    assert held.schema == SCHEMA
    for fields in ({"guided_choice": ["a", "b"]}, {"structured_outputs": {"choice": ["a", "b"]}}):
        form = complete(**fields).settings.form
        assert form is not None
        assert form.choices == ("a", "b")


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI(exception_handlers=EXCEPTION_HANDLERS)

    @app.post("/chat/completions")
    def _chat(body: ChatCompletionBody) -> None:
        chat_request(body)

    @app.post("/completions")
    def _completions(body: CompletionBody) -> None:
        completion_request(body)

    return TestClient(app)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [*ChatCompletionBody.model_fields, *CompletionBody.model_fields, "tools", "best_of", "logit_bias", "suffix", "x"]
)


@settings(max_examples=150, deadline=None)
@given(fields=st.dictionaries(FIELDS, JSON, max_size=4), valid=st.booleans())
def test_any_object_is_a_request_or_an_error(client: TestClient, fields: dict[str, Any], *, valid: bool) -> None:
    for path, base in (("/chat/completions", {"messages": [USER]}), ("/completions", {"prompt": "Hello"})):
        response = client.post(path, json={**base, **fields} if valid else fields)
        assert response.status_code in (200, 400)
        if response.status_code == 400:
            error = response.json()["error"]
            assert {*error} == {"message", "type", "param", "code"}
            assert error["type"] == "invalid_request_error"
            assert "\n" not in error["message"]

"""Requests that are malformed or meant to harm: each a clear error in OpenAI's form, and the gateway goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.profiles import scaled
from tests.served_adapters import PAIRS

pytestmark = pytest.mark.unguarded("one way to the owner is enough")
CHAT: dict[str, Any] = {
    "model": "constant",
    "messages": [{"role": "user", "content": PAIRS[0].source}],
    "max_tokens": 3,
}
COMPLETION: dict[str, Any] = {"model": "constant", "prompt": "the thin", "max_tokens": 3}
PATHS = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION}
HALF = "\ud800"
SCORED = {"echo": True, "logprobs": 1}


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client


def sent(http: httpx.Client, path: str, content: str | bytes) -> httpx.Response:
    """The response to a body."""
    return http.post(path, content=content, headers={"Content-Type": "application/json"})


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, whose form is OpenAI's, in one line that is short."""
    assert response.json().keys() == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert len(error["message"].splitlines()) == 1
    assert len(response.text) < 1000
    return error


def schema(value: Any) -> dict[str, Any]:
    """The field that holds an answer to a JSON schema."""
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": value}}}


def nested(depth: int) -> dict[str, Any]:
    """A schema of objects within objects."""
    value: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}}
    return value


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        *("", "{", "null", "3", '"x"', "[[]]", "{'a': 1}", '{"a": 1}}'),
        *(b"\xff\xfe{", b'{"model": "\xff"}', '{"seed": ' + "9" * 5000 + "}", "[" * 100_000),
    ],
)
def test_a_body_that_is_no_object_of_json_is_refused(http: httpx.Client, path: str, body: str | bytes) -> None:
    response = sent(http, path, body)
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


STOPS: list[Any] = ["", ["a", ""], [3], {}, [HALF], HALF]
SCHEMA = "response_format.json_schema.schema"
SCHEMAS: list[Any] = [
    *(3, {"type": 3}, {"enum": []}, {"enum": [HALF]}, {"enum": [float("nan")]}),
    *({"$ref": "http://a.example/b"}, {"$ref": "#/$defs/a"}, nested(100)),
    {"properties": {str(n): {"type": "string"} for n in range(20_000)}, "type": "object"},
]
FIELDS: list[tuple[dict[str, Any], str | None]] = [
    *(({"temperature": value}, "temperature") for value in (float("nan"), float("inf"), "hot", -1, 10**400)),
    ({"seed": float("inf")}, "seed"),
    *(({"top_p": value}, "top_p") for value in (float("nan"), 1.5)),
    *(({"pema": {"lambda_max": value}}, "pema.lambda_max") for value in (float("nan"), 2)),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    *(({"n": value}, "n") for value in (0, 129, 10**30)),
    *(({"stop": value}, "stop") for value in STOPS),
    *(({"logprobs": value}, "logprobs") for value in (-1, 21, "many")),
    ({HALF: 1}, None),
    ({"pema": {HALF: 1}}, "pema"),
    *(({"pema": {"prefix": [value]}}, "pema.prefix.0") for value in (-1, "a")),
    *(({"pema": {"prefix": value}}, "pema.prefix") for value in ([10**20], [2], [5] * 3, [5] * 10_000)),
    *(({"guided_choice": value}, "guided_choice") for value in (list[str](), [""], [HALF])),
    ({"structured_outputs": {"choice": [HALF]}}, "structured_outputs.choice"),
    ({"response_format": {"type": "json_schema", "json_schema": nested(300)}}, "response_format"),
    *((schema(value), SCHEMA) for value in SCHEMAS),
]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_a_field_that_cannot_be_honoured_is_named(http: httpx.Client, path: str, streamed: bool) -> None:
    for fields, param in FIELDS:
        response = sent(http, path, json.dumps({**PATHS[path], "stream": streamed, **fields}))
        assert response.status_code == 400, fields
        error = error_of(response)
        assert error["type"] == "invalid_request_error"
        assert param is None or error["param"] == param, fields
    # The gateway goes on.
    assert sent(http, path, json.dumps(PATHS[path])).status_code == 200


UNFIT: list[Any] = [
    *("", " ", [], [[]], ["a", ""], [-1], [1.0], [True], {}, HALF, [10**9], [[5], [275]], [10**30], ["a", 5]),
]
PROMPTS: list[tuple[dict[str, Any], str, str | None]] = [
    *(({"prompt": value}, "prompt", None) for value in UNFIT),
    ({"prompt": "a" * 1000}, "prompt", "context_length_exceeded"),
    ({"prompt": [5] * 1000}, "prompt", "context_length_exceeded"),
    ({"prompt": ["a", "a" * 1000], **SCORED}, "prompt", "context_length_exceeded"),
    ({"prompt": ["a", [HALF]]}, "prompt", None),
    ({"prompt": HALF, **SCORED}, "prompt", None),
    ({"pema": {"prompt_tokens": 10**30}, **SCORED}, "pema.prompt_tokens", None),
    ({"prompt": ["a"] * 289}, "prompt", None),
    ({"prompt": ["a"] * 145, "n": 2, "temperature": 1}, "prompt", None),
]


@pytest.mark.parametrize("streamed", [False, True])
def test_prompts_that_cannot_be_continued_are_refused(http: httpx.Client, streamed: bool) -> None:
    for fields, param, code in PROMPTS:
        response = sent(http, "/v1/completions", json.dumps({**COMPLETION, "stream": streamed, **fields}))
        assert response.status_code == 400, fields
        error = error_of(response)
        assert (error["param"], error["code"]) == (param, code), fields


def test_large_but_possible_requests_are_answered(http: httpx.Client) -> None:
    possible: list[dict[str, Any]] = [
        {"seed": 10**400},
        {"max_tokens": 10**300},
        {"top_k": 10**300, "temperature": 1.0},
        *({"temperature": value} for value in (1e308, 1e-320)),
        {"temperature": 1.0, "repetition_penalty": 1e308, "top_p": 0},
        {"stop": ["xyz"] * 20_000},
        {"guided_choice": ["the" * 5000, "her"]},
        schema({"type": "string", "pattern": "^(a+)+$"}),
        schema({"type": "array", "items": {"type": "string"}, "minItems": 10**9}),
    ]
    for fields in possible:
        response = sent(http, "/v1/completions", json.dumps(COMPLETION | fields))
        assert response.status_code == 200, (fields, response.text)


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(HALF)
_VALUES = st.recursive(
    _SCALARS, lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=4), each, max_size=3)
)
_NAMES = {
    *("model", "messages", "prompt", "echo", "logprobs", "top_logprobs", "temperature", "top_p", "top_k", "n", "seed"),
    *("stop", "max_tokens", "max_completion_tokens", "stream", "stream_options", "repetition_penalty", "pema"),
    *("response_format", "guided_choice", "structured_outputs", "tools", "logit_bias", "best_of", "suffix", "user"),
}
_SMALL = st.integers(0, 30) | st.floats(0, 2)
_TEXTS = st.text(max_size=8) | st.lists(st.text(max_size=4), max_size=3) | st.lists(st.integers(0, 300), max_size=4)
_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "tool"]), "content": _TEXTS | _VALUES}
)
_PEMA = st.dictionaries(
    st.sampled_from(["explain", "schedule", "lambda_max", "length_reward", "prefix", "prompt_tokens"]),
    _SMALL | _TEXTS | st.booleans() | st.sampled_from(["none", "constant", "gradual"]),
    max_size=3,
)
_FIELD = _VALUES | _SMALL | _TEXTS | st.booleans() | _PEMA | st.lists(_MESSAGE, max_size=3)
_CHANGES = st.dictionaries(st.sampled_from(sorted(_NAMES)), _FIELD, max_size=4)


@settings(max_examples=scaled(100))
@given(path=st.sampled_from(sorted(PATHS)), changes=_CHANGES)
def test_no_body_is_a_failure_of_the_gateway(http: httpx.Client, path: str, changes: dict[str, Any]) -> None:
    response = sent(http, path, json.dumps({**PATHS[path], **changes}))
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error_of(response)

"""Odd requests by curl: what changes nothing is taken, and every refusal has OpenAI's form."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from typing import Any

import pytest

from data_owner_client import TrainedAdapter, generate, translate
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.plm.remote_plm import RemotePlm
from tests.served_adapters import PAIRS, TASK

pytestmark = pytest.mark.unguarded("one way to the owner is enough")
SOURCE = PAIRS[0].source
CHAT: dict[str, Any] = {"model": "constant", "messages": [{"role": "user", "content": SOURCE}]}
_JSON = ("--header", "Content-Type: application/json")
_SECONDS = 60


@pytest.fixture
def adapter_name() -> str:
    return "constant"


@dataclass(frozen=True)
class Response:
    """A response as curl received it.

    Attributes:
        status: HTTP status.
        text: the body.
    """

    status: int
    text: str

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.text)

    @property
    def error(self) -> dict[str, Any]:
        """The error, whose form is OpenAI's."""
        assert self.json.keys() == {"error"}
        error: dict[str, Any] = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert len(error["message"].splitlines()) == 1
        return error


def curl(url: str, *arguments: str, stdin: str = "") -> Response:
    """Run curl on a URL."""
    command = ["curl", "--silent", "--show-error", "--no-buffer", "--max-time", str(_SECONDS), "--noproxy", "*"]
    done = subprocess.run(
        [*command, "--write-out", "\n%{http_code}", *arguments, url],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text, _, status = done.stdout.rpartition("\n")
    return Response(int(status), text)


def post(url: str, body: Any, *arguments: str) -> Response:
    """Post JSON, or a text as it is."""
    text = body if isinstance(body, str) else json.dumps(body)
    return curl(url, *_JSON, *arguments, "--data-binary", "@-", stdin=text)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": None, "max_tokens": None, "stop": None, "n": None, "seed": None, "stream": None, "pema": None},
        {"stop": []},
        {"n": 1, "best_of": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}},
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]},
        {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True},
        {"reasoning_effort": "low", "verbosity": "low", "prompt_cache_key": "k", "safety_identifier": "s"},
        {"something": {"nobody": ["knows"]}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": SOURCE}]}]},
        {"messages": [{"role": "user", "content": SOURCE, "name": "me", "id": "1", "opts": {}, "tool_calls": None}]},
        {"messages": [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": SOURCE}]},
        {"top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1},
    ],
)
def test_what_changes_nothing_is_taken(
    url: str, plm: RemotePlm, adapter: TrainedAdapter, fields: dict[str, Any]
) -> None:
    for prefix in ("/v1", ""):
        response = post(f"{url}{prefix}/chat/completions", CHAT | fields)
        assert response.status == 200, response.text
        (choice,) = response.json["choices"]
        assert [choice["message"]["content"]] == translate(plm, [SOURCE], adapter=adapter).texts
        assert choice["message"].keys() == {"role", "content", "refusal"}


def test_log_probabilities_may_list_only_the_tokens_themselves(
    url: str, plm: RemotePlm, adapter: TrainedAdapter
) -> None:
    prompt = TASK.prompt(SOURCE, plm.tokenizer).text
    expected = generate(plm, [prompt], adapter=adapter, decoding=DecodingSettings(max_new_tokens=4))
    body = {"model": "constant", "prompt": prompt, "max_tokens": 4}
    for logprobs in (0, 3):
        (choice,) = post(f"{url}/v1/completions", body | {"logprobs": logprobs}).json["choices"]
        found = choice["logprobs"]
        assert {len(part) for part in found.values()} == {len(expected.choices[0])}
        scores = [token.logprob for token in expected.choices[0]]
        assert found["token_logprobs"] == pytest.approx(scores, abs=1e-4)
        for own, top in zip(found["token_logprobs"], found["top_logprobs"], strict=True):
            assert own in top.values()
            assert 1 <= len(top) <= max(1, logprobs)
    assert post(f"{url}/v1/completions", body | {"logprobs": False}).json["choices"][0]["logprobs"] is None


def test_a_stream_is_events_until_done(url: str, plm: RemotePlm, adapter: TrainedAdapter) -> None:
    response = post(f"{url}/v1/chat/completions", CHAT | {"stream": True}, "--include")
    head, _, text = response.text.replace("\r\n", "\n").partition("\n\n")
    assert "content-type: text/event-stream" in head.lower()
    events = [line for line in text.splitlines() if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in events)
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in events[:-1]]
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["choices"] for chunk in chunks)
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert ["".join(pieces)] == translate(plm, [SOURCE], adapter=adapter).texts


MALFORMED: list[tuple[str, Any, int, str | None]] = [
    ("/v1/chat/completions", "{", 400, None),
    ("/v1/chat/completions", "[]", 400, None),
    ("/v1/chat/completions", {"model": "constant"}, 400, "messages"),
    ("/v1/chat/completions", {"model": "constant", "messages": "hi"}, 400, "messages"),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "wizard", "content": "hi"}]}, 400, "messages.0.role"),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None),
    ("/v1/chat/completions", CHAT | {"max_tokens": "many"}, 400, "max_tokens"),
    ("/v1/chat/completions", CHAT | {"max_tokens": 0}, 400, "max_tokens"),
    ("/v1/chat/completions", CHAT | {"temperature": "hot"}, 400, "temperature"),
    ("/v1/chat/completions", CHAT | {"stop": [""]}, 400, "stop"),
    ("/v1/chat/completions", CHAT | {"tools": [{"type": "function"}]}, 400, "tools"),
    ("/v1/chat/completions", CHAT | {"seed": "x"}, 400, "seed"),
    ("/v1/completions", {"model": "constant"}, 400, "prompt"),
    ("/v1/completions", {"model": "constant", "prompt": ""}, 400, "prompt"),
    ("/v1/completions", {"model": "constant", "prompt": [10**9]}, 400, "prompt"),
    ("/v1/completions", {"model": "constant", "prompt": [["a"]]}, 400, "prompt"),
    ("/v1/completions", {"model": "constant", "prompt": "a", "logprobs": 50}, 400, "logprobs"),
    ("/v1/completions", {"model": "constant", "prompt": "a", "suffix": "b"}, 400, "suffix"),
    ("/v1/embeddings", {"model": "constant", "input": "a"}, 404, None),
    ("/v1/responses", {"model": "constant", "input": "a"}, 404, None),
    ("/detokenize", {"tokens": [-1]}, 400, None),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), MALFORMED)
def test_malformed_requests_have_clear_errors(url: str, path: str, body: Any, status: int, param: str | None) -> None:
    response = post(f"{url}{path}", body)
    assert response.status == status, response.text
    assert response.error["type"] == "invalid_request_error"
    if param is not None:
        assert response.error["param"] == param


def test_other_ways_to_ask_are_refused_in_the_same_form(url: str) -> None:
    chat = f"{url}/v1/chat/completions"
    assert curl(chat).status == 405
    assert curl(chat).error["code"] == "method_not_allowed"
    assert curl(chat, "--data", json.dumps(CHAT)).status == 415
    assert post(chat, CHAT, "--header", "Host: evil.example").status == 421
    assert post(chat, CHAT, "--header", "Origin: https://evil.example").status == 403
    assert post(chat, "[" * 100_000).status == 400
    assert post(chat, CHAT | {"user": "x" * 5_000_000}).status == 413
    assert curl(f"{url}/health", "--head").status == 200
    assert curl(f"{url}/health").json["status"] == "ok"

"""Tasks of other kinds through the gateway: conversations and labels; and an owner who is away for any of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from data_owner_client import Task, TrainedAdapter, TrainingSettings, build_memories, read_pairs, train, translate
from data_owner_client.data.pairs import Conversation
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.plm.remote_plm import RemotePlm
from harness.tiny_models import save_model
from protocol.errors import ConnectionFailed, IdentityMismatch, Overloaded, PemaError
from tests import guard, support
from tests.gateways import FaultyPlm, gateway
from tests.wire.test_chat import PLAIN
from tests.wire.test_classification import BRIEF, LABELS
from tests.wire.test_classification import PAIRS as LABELLED
from tests.wire.test_conversations import messages, write

pytestmark = pytest.mark.unguarded("one way to the owner is enough")
TURNS: list[dict[str, str]] = [
    {"role": "system", "content": "the thin"},
    {"role": "user", "content": "die 1"},
    {"role": "assistant", "content": "an"},
    {"role": "user", "content": "die 2"},
]
BOUND = DecodingSettings(max_new_tokens=8)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = save_model("llama", tmp_path_factory.mktemp("model") / "llama", chat_template=PLAIN)
    with support.serve(support.make_service(folder)) as url:
        yield url


@pytest.fixture(scope="module")
def plm(server: str) -> Iterator[RemotePlm]:
    with guard.remote_plm(server) as remote:
        yield remote


@pytest.fixture(scope="module")
def adapters(plm: RemotePlm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of an adapter for conversations and of one for labels."""
    root = tmp_path_factory.mktemp("tasks")
    talks = read_pairs(write(root / "talks.jsonl", [messages(number) for number in range(4)]))
    settings = TrainingSettings(rank=8, epochs=2, retrieved_examples=0, selection_texts=0, minutes=0)
    for name, task, pairs, chosen in (
        ("chat", Task(name="t", kind="chat"), talks, settings),
        ("classify", Task(name="t", kind="classify"), LABELLED, BRIEF),
    ):
        memory = root / f"memory-{name}"
        build_memories(
            plm, task, pairs, memory, validation=pairs[:4], context_mode="teacher-forced", share_targets=True
        )
        train(plm, memory, root / name, settings=chosen)
    return {name: root / name for name in ("chat", "classify")}


@pytest.fixture(scope="module")
def url(server: str, adapters: dict[str, Path]) -> Iterator[str]:
    with gateway(server, adapters) as address:
        yield address


def asked(url: str, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    """The response to a request; a gateway that hangs fails the test."""
    # Unlike httpx, this can send half of a surrogate pair.
    return httpx.post(
        f"{url}{path}", content=json.dumps(body), headers={"Content-Type": "application/json"}, timeout=20
    )


@pytest.mark.parametrize("model", ["chat", None])
def test_a_conversation_is_taken_as_it_is(
    url: str, plm: RemotePlm, adapters: dict[str, Path], model: str | None
) -> None:
    adapter = TrainedAdapter.load(adapters[model]) if model else None
    task = None if adapter else Task(name="conversation", kind="chat")
    expected = [
        translate(plm, [Conversation(tuple(turns))], adapter=adapter, task=task, decoding=BOUND).texts[0]
        for turns in (TURNS, TURNS[3:])
    ]
    for turns, text in zip((TURNS, TURNS[3:]), expected, strict=True):
        response = asked(url, model=model or plm.card.name, messages=turns, max_tokens=8)
        assert response.json()["choices"][0]["message"]["content"] == text
        assert "x-pema-note" not in response.headers


def test_a_label_is_answered_with_its_probabilities(url: str, plm: RemotePlm, adapters: dict[str, Path]) -> None:
    sources = [str(pair.source) for pair in LABELLED[:3]]
    expected = translate(plm, sources, adapter=TrainedAdapter.load(adapters["classify"]))
    assert expected.label_probabilities is not None
    for source, text, probabilities in zip(sources, expected.texts, expected.label_probabilities, strict=True):
        turns = [*TURNS[:1], {"role": "user", "content": source}]
        response = asked(url, model="classify", messages=turns, pema={"explain": True}, logprobs=True)
        (choice,) = response.json()["choices"]
        assert choice["message"]["content"] == text
        assert choice["pema"]["labels"] == pytest.approx(probabilities, abs=1e-4)
        assert sum(choice["pema"]["labels"].values()) == pytest.approx(1)
        assert choice["pema"]["labels"].keys() == set(LABELS)
        assert choice["finish_reason"] == "stop"
        assert "x-pema-note" in response.headers
        streamed = asked(url, model="classify", messages=turns, stream=True)
        assert streamed.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": 1}, "temperature", "unsupported_parameter"),
        ({"guided_choice": ["her"]}, "response_format", "unsupported_parameter"),
        ({"pema": {"prefix": [5]}}, "pema.prefix", "unsupported_parameter"),
        ({"messages": [{"role": "user", "content": "a" * 1000}]}, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", None),
    ],
)
def test_what_labels_do_not_have_is_refused(
    url: str, fields: dict[str, Any], param: str, code: str | None, streamed: bool
) -> None:
    response = asked(url, **{"model": "classify", "messages": TURNS, "stream": streamed, **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error["message"]


def test_a_model_without_a_template_answers_no_conversation(tmp_path: Path) -> None:
    with (
        support.serve(support.make_service(save_model("llama", tmp_path / "bare", chat_template=None))) as server,
        gateway(server, {}) as url,
    ):
        response = asked(url, messages=TURNS)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "unsupported"
        assert response.json()["error"]["param"] == "model"
        assert asked(url, "/v1/completions", prompt="the", max_tokens=2).status_code == 200


CALLS: dict[str, dict[str, Any]] = {
    "generation": {"model": "chat", "messages": TURNS},
    "labels": {"model": "classify", "messages": [{"role": "user", "content": LABELLED[0].source}]},
    "scoring": {"path": "/v1/completions", "model": "llama", "prompt": "the thin", "echo": True, "logprobs": 1},
}
CALLS["scoring"]["max_tokens"] = 1


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Overloaded("The server is busy.", retry_after_s=1.0), 429, "rate_limit_exceeded"),
        (ConnectionFailed("The server is away."), 503, "upstream_unavailable"),
        (IdentityMismatch("This is another model."), 503, "model_mismatch"),
    ],
)
def test_an_owner_who_is_away_is_an_error_until_it_comes_back(
    server: str, adapters: dict[str, Path], call: str, streamed: bool, error: PemaError, status: int, code: str
) -> None:
    is_away = True
    with gateway(
        server, adapters, wrap=lambda plm: FaultyPlm(plm, lambda number: error if is_away else None), patience=0.5
    ) as url:
        response = asked(url, **{**CALLS[call], "stream": streamed})
        assert response.status_code == status
        assert response.json()["error"]["code"] == code
        assert response.json()["error"]["type"] in ("rate_limit_error", "server_error")
        assert ("retry-after" in response.headers) == (code != "model_mismatch")
        is_away = False
        support.until(lambda: asked(url, **{**CALLS[call], "stream": streamed}).status_code == 200, within_s=20)

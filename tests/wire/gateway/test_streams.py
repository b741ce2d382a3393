"""Streams have the text, tokens and scores of whole answers, alone and beside others with other settings."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from data_owner_client import SamplingSettings, TrainedAdapter, generate, translate
from data_owner_client.data.answer_form import AnswerForm
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.plm.remote_plm import RemotePlm
from tests.gateways import gateway
from tests.served_adapters import INTERPOLATIONS, PAIRS

pytestmark = pytest.mark.unguarded("one way to the owner is enough")
SOURCES = [pair.source for pair in PAIRS[:6]]
LONGEST = 12
BOUND = DecodingSettings(max_new_tokens=LONGEST)
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["the", "Tür"]}}, "required": ["a"]}
FORM = {"type": "json_schema", "json_schema": {"name": "s", "schema": {**SCHEMA, "additionalProperties": False}}}
DRAWN = {"temperature": 1.1, "seed": 5}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"stop": ["e", "th", "in on", "ür"]},
    DRAWN,
    {**DRAWN, "n": 3, "top_p": 0.9},
    {"response_format": FORM},
    {"repetition_penalty": 1.3},
    {"pema": {"schedule": "none"}},
    {**DRAWN, "stop": ["h", "\ufffd"]},
]


def chat(source: str, **fields: Any) -> tuple[str, dict[str, Any]]:
    """Path and body of a chat."""
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": source}], "logprobs": True} | fields


def completion(prompt: str, **fields: Any) -> tuple[str, dict[str, Any]]:
    """Path and body of a completion."""
    return "/v1/completions", {"prompt": prompt, "logprobs": 3} | fields


FORMS: tuple[Callable[..., tuple[str, dict[str, Any]]], ...] = (chat, completion)
CALLS = [
    call(SOURCES[at % len(SOURCES)], model=[*INTERPOLATIONS][(at + shift) % 3], max_tokens=LONGEST, **fields)
    for at, fields in enumerate(SETTINGS)
    for shift, call in enumerate(FORMS)
] + [
    completion(SOURCES[0], model="constant", max_tokens=LONGEST, echo=True),
    completion(SOURCES[1], model="constant", max_tokens=LONGEST, echo=True, n=2, **DRAWN),
    chat(SOURCES[2], model="constant", top_logprobs=4, pema={"explain": True}),
]


async def _answer(client: httpx.AsyncClient, path: str, body: dict[str, Any], *, streamed: bool) -> dict[str, Any]:
    """The whole answer; of a stream, put together from its chunks."""
    fields = {**body, "stream": streamed, "stream_options": {"include_usage": True}}
    response = await client.post(path, json=fields)
    assert response.status_code == 200, response.text
    if streamed:
        return joined(response.text, is_chat="chat" in path)
    kind: Any = ChatCompletion if "chat" in path else Completion
    kind.model_validate_json(response.text, strict=True)
    whole: dict[str, Any] = response.json()
    return whole


def joined(text: str, *, is_chat: bool) -> dict[str, Any]:
    """The whole answer of a stream, whose chunks obey OpenAI's rules."""
    *events, end = [line.removeprefix("data: ") for line in text.split("\n\n") if line and not line.startswith(":")]
    assert end == "[DONE]"
    chunks = [json.loads(event) for event in events]
    kind: Any = ChatCompletionChunk if is_chat else Completion
    for event in events:
        # The type of completions is that of whole answers, whose reasons are never null.
        kind.model_validate_json(event if is_chat else event.replace('"finish_reason":null', '"finish_reason":"stop"'))
    *pieces, last = chunks
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert last["choices"] == []
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in pieces)
    choices = dict[int, dict[str, Any]]()
    for chunk in pieces:
        _add(choices, chunk["choices"][0], is_chat=is_chat)
    ordered = [choices[index] for index in sorted(choices)]
    pema = {"pema": pieces[-1]["pema"]} if "pema" in pieces[-1] else {}
    assert not any("pema" in chunk for chunk in pieces[:-1])
    return {"choices": ordered, "usage": last["usage"], **pema}


def _add(choices: dict[int, dict[str, Any]], piece: dict[str, Any], *, is_chat: bool) -> None:
    """Add a chunk's choice to the whole ones."""
    index = piece["index"]
    if index not in choices:
        choices[index] = {"index": index, "text": "", "logprobs": None, "finish_reason": None, "tokens": []}
        if is_chat:
            assert piece["delta"] == {"role": "assistant", "content": ""}
            assert piece["finish_reason"] is None
            return
    choice = choices[index]
    assert choice["finish_reason"] is None
    content = piece["delta"].get("content", "") if is_chat else piece["text"]
    if piece["finish_reason"] is not None:
        assert not content
        assert piece["logprobs"] is None
    choice["text"] += content
    choice["finish_reason"] = piece["finish_reason"]
    choice["tokens"] += piece.get("pema", {"tokens": []})["tokens"]
    lists = {name: value for name, value in (piece["logprobs"] or {}).items() if value is not None}
    before = choice["logprobs"] or {}
    choice["logprobs"] = {name: before.get(name, []) + value for name, value in lists.items()} or choice["logprobs"]


def parts(answer: dict[str, Any]) -> list[Any]:
    """The parts of an answer that are the same whole and streamed."""
    found = list[Any]()
    for choice in answer["choices"]:
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        logprobs = {name: value for name, value in (choice["logprobs"] or {}).items() if value}
        tokens = choice.get("tokens") or choice.get("pema", {"tokens": []})["tokens"]
        found.append((choice["index"], text, choice["finish_reason"], logprobs, [token["id"] for token in tokens]))
    return [found, answer["usage"]]


def flat(value: Any) -> Any:
    """A value with its numbers rounded, as calls of other sizes differ in the last digits."""
    if isinstance(value, float):
        return pytest.approx(value, abs=1e-4)
    if isinstance(value, dict):
        return {key: flat(part) for key, part in value.items()}
    return [flat(part) for part in value] if isinstance(value, (list, tuple)) else value


def ask(url: str, *, streamed: bool, at_once: int) -> list[dict[str, Any]]:
    """The answers to all calls."""

    async def all_of_them() -> list[dict[str, Any]]:
        places = asyncio.Semaphore(at_once)

        async def one(path: str, body: dict[str, Any]) -> dict[str, Any]:
            async with places:
                return await _answer(client, path, body, streamed=streamed)

        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            return await asyncio.gather(*(one(path, body) for path, body in CALLS))

    return asyncio.run(all_of_them())


def test_streams_beside_fifteen_others_are_whole_answers_alone(url: str) -> None:
    alone, beside = ask(url, streamed=False, at_once=1), ask(url, streamed=True, at_once=16)
    for call, whole, stream in zip(CALLS, alone, beside, strict=True):
        # A list of two beside a list of two: pytest's approximate numbers are on one side alone.
        assert json.loads(json.dumps(parts(stream))) == flat(json.loads(json.dumps(parts(whole)))), call


@pytest.mark.parametrize("adapter_name", ["gradual"])
def test_settings_mean_what_they_mean_in_translate(url: str, plm: RemotePlm, adapter: TrainedAdapter) -> None:
    free = DecodingSettings(max_new_tokens=LONGEST, length_bound=False)
    draws = SamplingSettings(temperature=1.1, seed=5, candidates_only=True)
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (SETTINGS[1], {"decoding": BOUND, "stop": SETTINGS[1]["stop"]}),
        (SETTINGS[2], {"decoding": BOUND, "sampling": draws}),
        (SETTINGS[4], {"decoding": free, "form": AnswerForm(FORM["json_schema"]["schema"])}),  # type: ignore[index]
        (SETTINGS[7], {"decoding": BOUND, "sampling": draws, "stop": SETTINGS[7]["stop"]}),
    ]
    with httpx.Client(base_url=url, timeout=60) as client:
        for fields, options in cases:
            expected = translate(plm, SOURCES[:1], adapter=adapter, **options)
            path, body = chat(SOURCES[0], model="gradual", max_tokens=LONGEST, pema={"explain": True}, **fields)
            (choice,) = client.post(path, json=body).json()["choices"]
            assert choice["message"]["content"] == expected.texts[0]
            assert [token["id"] for token in choice["pema"]["tokens"]] == expected.token_ids[0]


@pytest.fixture(scope="module")
def whole_head_url(tiny_server: str, adapters: Any) -> Iterator[str]:
    with gateway(tiny_server, adapters, full_head=True) as address:
        yield address


@pytest.mark.parametrize("adapter_name", ["constant"])
def test_draws_are_from_the_whole_vocabulary_where_the_head_is_there(
    whole_head_url: str, plm: RemotePlm, adapter: TrainedAdapter
) -> None:
    sampling = SamplingSettings(temperature=1.3, top_p=0.95, seed=7)
    fields: dict[str, Any] = {"temperature": 1.3, "top_p": 0.95, "seed": 7, "max_tokens": LONGEST}
    with httpx.Client(base_url=whole_head_url, timeout=60) as client:
        for source in SOURCES[:3]:
            expected = translate(plm, [source], adapter=adapter, sampling=sampling, decoding=BOUND).texts
            path, body = chat(source, model="constant", **fields)
            assert client.post(path, json=body).json()["choices"][0]["message"]["content"] == expected[0]
        bare = generate(plm, SOURCES[:1], sampling=sampling, decoding=BOUND).texts
        path, body = completion(SOURCES[0], model=plm.card.name, **fields)
        assert client.post(path, json=body).json()["choices"][0]["text"] == bare[0]

"""Answers, errors and streams of the gateway, as openai-python reads them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from data_owner_client.gateway.openai.errors import ApiError, api_error, error_response
from data_owner_client.gateway.openai.events import DONE, KEEP_ALIVE, frame, server_sent_events
from data_owner_client.gateway.openai.logprobs import LoggedToken, TextOffsets, chat_logprobs, completion_logprobs
from data_owner_client.gateway.openai.responses import AnswerHead, Choice, Usage
from protocol import errors
from protocol.errors import PemaError

TOKENS = [
    LoggedToken("A", b"A", None),
    LoggedToken("\N{REPLACEMENT CHARACTER}", b"\xc3", -0.5, (LoggedToken("é", "é".encode(), -0.25),)),
    LoggedToken("\N{REPLACEMENT CHARACTER}", b"\xa9", -math.inf),
    LoggedToken("B", b"B", -1.5),
]
HEAD = AnswerHead("m", chat=True, include_usage=True)


def sdk(content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> openai.OpenAI:
    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(status, content=content, headers=headers or {"content-type": "text/event-stream"})

    transport = httpx2.Client(transport=httpx2.MockTransport(answer))
    return openai.OpenAI(api_key="k", base_url="http://gateway/v1", http_client=transport, max_retries=0)


async def events(*items: dict[str, Any] | Exception) -> bytes:
    async def chunks() -> AsyncIterator[dict[str, Any]]:
        for item in items:
            if isinstance(item, Exception):
                raise item
            yield item

    return b"".join([part async for part in server_sent_events(chunks())])


def test_whole_answers_are_of_openais_types() -> None:
    choices = [Choice(1, "b", "length"), Choice(0, "a", "stop", chat_logprobs(TOKENS[1:]), {"tokens": []})]
    answer = ChatCompletion.model_validate(HEAD.whole(choices, Usage(3, 4)))
    assert [choice.message.content for choice in answer.choices] == ["a", "b"]
    assert answer.usage is not None
    assert answer.usage.total_tokens == 7
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [each.logprob for each in logprobs.content] == [-0.5, -9999.0, -1.5]
    head = AnswerHead("m", chat=False)  # the types have no null, which a first token has all the same
    text = Completion.model_validate(
        head.whole([Choice(0, "a", "stop", completion_logprobs(TOKENS[1:], TextOffsets()))], Usage(1, 1))
    )
    assert text.choices[0].text == "a"


def test_completions_have_four_lists_of_one_length() -> None:
    logprobs = completion_logprobs(TOKENS, TextOffsets(2))
    assert logprobs["tokens"] == ["A", r"bytes:\xc3", r"bytes:\xa9", "B"]
    assert logprobs["token_logprobs"] == [None, -0.5, -9999.0, -1.5]
    assert logprobs["top_logprobs"] == [None, {"é": -0.25, r"bytes:\xc3": -0.5}, {r"bytes:\xa9": -9999.0}, {"B": -1.5}]
    assert logprobs["text_offset"] == [2, 3, 3, 4]


def test_openai_reads_a_stream() -> None:
    content = asyncio.run(
        events(
            HEAD.role_chunk(0),
            HEAD.text_chunk(Choice(0, "a\u2028b")),
            HEAD.finish_chunk(0, "stop"),
            HEAD.usage_chunk(Usage(1, 2)),
        )
    )
    assert content.endswith(DONE)
    messages: list[Any] = [{"role": "user", "content": "x"}]
    chunks = list(sdk(content).chat.completions.create(model="m", messages=messages, stream=True))
    assert all(ChatCompletionChunk.model_validate(chunk.to_dict()) for chunk in chunks)
    assert [chunk.choices[0].delta.content for chunk in chunks[:-1]] == ["", "a\u2028b", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, "stop"]
    assert chunks[-1].choices == []
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("error", [errors.NotReady("Away.", retry_after_s=2), ApiError(400, "Away.")])
def test_an_error_ends_a_stream(error: Exception) -> None:
    content = asyncio.run(events(HEAD.role_chunk(0), error))
    assert content.endswith(DONE)
    messages: list[Any] = [{"role": "user", "content": "x"}]
    with pytest.raises(openai.APIError, match="Away"):
        list(sdk(content).chat.completions.create(model="m", messages=messages, stream=True))


def test_silence_is_filled_and_a_closed_stream_closes_its_source() -> None:
    closed = []

    async def silent() -> AsyncIterator[dict[str, Any]]:
        try:
            await asyncio.Event().wait()
            yield {}
        finally:
            closed.append(True)

    async def read() -> bytes:
        stream = server_sent_events(silent(), keep_alive_s=0.0)
        first = await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        return first

    assert asyncio.run(read()) == KEEP_ALIVE
    assert closed


@pytest.mark.parametrize(
    ("error", "kind", "code", "headers"),
    [
        (errors.Unauthenticated("x"), openai.InternalServerError, "upstream_auth", {"x-should-retry": "false"}),
        (errors.Forbidden("x"), openai.InternalServerError, "upstream_auth", {}),
        (errors.BudgetExhausted("x"), openai.PermissionDeniedError, "insufficient_quota", {}),
        (
            errors.QuotaExceeded("x", retry_after_s=2.5),
            openai.RateLimitError,
            "rate_limit_exceeded",
            {"retry-after": "3"},
        ),
        (errors.TimedOut("x"), openai.InternalServerError, "upstream_unavailable", {"retry-after": "1"}),
        (errors.OverLimit("x"), openai.BadRequestError, "context_length_exceeded", {}),
        (errors.InvalidData("x"), openai.BadRequestError, None, {}),
        (errors.IdentityMismatch("x"), openai.InternalServerError, "model_mismatch", {"x-should-retry": "false"}),
        (errors.ServerFault("x"), openai.InternalServerError, "upstream_error", {}),
    ],
)
def test_openai_raises_the_errors(
    error: PemaError, kind: type[openai.APIStatusError], code: str | None, headers: dict[str, str]
) -> None:
    response = error_response(api_error(error))
    failing = sdk(bytes(response.body), response.status_code, dict(response.headers))
    with pytest.raises(kind) as caught:
        failing.completions.create(model="m", prompt="x")
    assert caught.value.code == code
    assert headers.items() <= {**caught.value.response.headers}.items()


def test_events_refuse_what_json_cannot_say() -> None:
    with pytest.raises(ValueError, match="JSON"):
        frame({"logprob": -math.inf})

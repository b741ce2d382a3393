"""Refusals as openai-python meets them: its own exceptions and retries, streams that break off, clients that leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, DefaultHttpxClient, OpenAI

from protocol.errors import (
    BudgetExhausted,
    ConnectionFailed,
    Forbidden,
    IdentityMismatch,
    NotReady,
    Overloaded,
    PemaError,
    Unauthenticated,
)
from tests.gateways import FaultyPlm, gateway
from tests.served_adapters import PAIRS
from tests.support import until

pytestmark = pytest.mark.unguarded("one way to the owner is enough")
MESSAGES: list[Any] = [{"role": "user", "content": PAIRS[0].source}]
Fault = Callable[[int], PemaError | None]


@dataclass
class Attempts:
    """Requests that a client has sent, its retries among them."""

    count: int = 0


@contextmanager
def faulty(server: str, adapters: dict[str, Path], fault: Fault, **settings: Any) -> Iterator[tuple[str, FaultyPlm]]:
    """Address of a gateway whose calls to the owner fail where a function says so, and its PLM."""
    made = list[FaultyPlm]()

    def wrap(plm: Any) -> FaultyPlm:
        made.append(FaultyPlm(plm, fault))
        return made[0]

    with gateway(server, adapters, wrap=wrap, **settings) as url:
        yield url, made[0]


@contextmanager
def counted(url: str, **settings: Any) -> Iterator[tuple[OpenAI, Attempts]]:
    """A client, and its attempts."""
    attempts = Attempts()

    def count(request: Any) -> None:
        attempts.count += 1

    http_client = DefaultHttpxClient(event_hooks={"request": [count]})
    with OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http_client, **settings) as client:
        yield client, attempts


def body_of(error: openai.APIError) -> dict[str, Any]:
    """The error's body, which has OpenAI's fields and reads in one line."""
    assert isinstance(error.body, dict)
    assert error.body.keys() == {"message", "type", "param", "code"}
    assert len(error.body["message"].splitlines()) == 1
    return error.body


LONG = "the thin " * 100
_TOKENS, _CALL_SECONDS = 110, 0.5
_LEAST_CALLS = _TOKENS // 17
"""Calls of an answer of which each adds a token and 16 drafts at most."""
REFUSED: list[tuple[dict[str, Any], type[openai.APIStatusError], str | None, str | None]] = [
    ({"model": "nobody"}, openai.NotFoundError, "model", "model_not_found"),
    ({"messages": [{"role": "user", "content": LONG}]}, openai.BadRequestError, None, "context_length_exceeded"),
    ({"messages": []}, openai.BadRequestError, "messages", None),
    ({"temperature": -1}, openai.BadRequestError, "temperature", None),
    ({"top_p": 1.5}, openai.BadRequestError, "top_p", None),
    ({"n": 2}, openai.BadRequestError, "n", None),
    ({"logit_bias": {"5": 1}}, openai.BadRequestError, "logit_bias", "unsupported_parameter"),
    ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs", None),
    ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format.type", None),
    ({"extra_body": {"pema": {"lambda": 1}}}, openai.BadRequestError, "pema.lambda", None),
    ({"extra_body": {"pema": {"lambda_max": 2}}}, openai.BadRequestError, "pema.lambda_max", None),
]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("fields", "kind", "param", "code"), REFUSED)
def test_what_cannot_be_honoured_is_refused_once(
    url: str,
    fields: dict[str, Any],
    kind: type[openai.APIStatusError],
    param: str | None,
    code: str | None,
    streamed: bool,
) -> None:
    with counted(url) as (client, attempts), pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": "constant", "messages": MESSAGES, "stream": streamed, **fields})
    body = body_of(caught.value)
    assert body["type"] == "invalid_request_error"
    assert (body["param"], body["code"]) == (param or body["param"], code)
    assert attempts.count == 1


def test_a_refusal_of_the_owner_is_repeated_after_its_time(tiny_server: str, adapters: dict[str, Path]) -> None:
    busy = Overloaded("The server is busy.", retry_after_s=0.6)
    with (
        faulty(tiny_server, adapters, lambda call: busy if call == 1 else None) as (url, plm),
        counted(url, max_retries=2) as (client, attempts),
    ):
        answer = client.chat.completions.create(model="constant", messages=MESSAGES)
        assert answer.choices[0].finish_reason
        assert attempts.count == 2
        assert plm.calls > 1


def test_a_refusal_of_the_owner_is_handed_on_with_its_time(tiny_server: str, adapters: dict[str, Path]) -> None:
    busy = Overloaded("The server is busy.", retry_after_s=6.3)
    with (
        faulty(tiny_server, adapters, lambda call: busy) as (url, plm),
        counted(url, max_retries=0) as (client, _),
    ):
        for streamed in (False, True):
            with pytest.raises(openai.RateLimitError) as caught:
                client.chat.completions.create(model="constant", messages=MESSAGES, stream=streamed)
            assert int(caught.value.response.headers["retry-after"]) in (6, 7)
            assert body_of(caught.value)["code"] == "rate_limit_exceeded"
        # The second request was not shown to an owner that has said when to come back.
        assert plm.calls == 1


@pytest.mark.parametrize(
    ("error", "kind", "code", "repeats"),
    [
        (ConnectionFailed("The server is away."), openai.InternalServerError, "upstream_unavailable", True),
        (
            NotReady("The model is loading.", retry_after_s=0.2),
            openai.InternalServerError,
            "upstream_unavailable",
            True,
        ),
        (Unauthenticated("The key is unknown."), openai.InternalServerError, "upstream_auth", False),
        (Forbidden("The key may not decode."), openai.InternalServerError, "upstream_auth", False),
        (IdentityMismatch("This is another model."), openai.InternalServerError, "model_mismatch", False),
        (BudgetExhausted("No tokens are left."), openai.PermissionDeniedError, "insufficient_quota", False),
    ],
)
def test_only_what_may_succeed_later_is_repeated(
    tiny_server: str,
    adapters: dict[str, Path],
    error: PemaError,
    kind: type[openai.APIStatusError],
    code: str,
    repeats: bool,
) -> None:
    with (
        faulty(tiny_server, adapters, lambda call: error) as (url, _),
        counted(url, max_retries=1) as (client, attempts),
    ):
        with pytest.raises(kind) as caught:
            client.chat.completions.create(model="constant", messages=MESSAGES)
        assert body_of(caught.value)["code"] == code
        assert ("retry-after" in caught.value.response.headers) == repeats
        assert attempts.count == 1 + repeats


def test_an_error_within_a_stream_is_raised(tiny_server: str, adapters: dict[str, Path]) -> None:
    away = ConnectionFailed("The server is away.")
    with (
        faulty(tiny_server, adapters, lambda call: away if call > 2 else None, patience=0.0) as (url, plm),
        counted(url, max_retries=0) as (client, _),
    ):
        stream = client.completions.create(model=plm.card.name, prompt="the", max_tokens=100, stream=True)
        with pytest.raises(openai.APIError, match="away"):
            list(stream)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_stops_costing(tiny_server: str, adapters: dict[str, Path], streamed: bool) -> None:
    """The last calls that the answer would take are never made."""

    def slow(call: int) -> None:
        time.sleep(_CALL_SECONDS)

    with faulty(tiny_server, adapters, slow) as (url, plm):
        asyncio.run(_leave(url, plm, streamed))
        until(lambda: httpx.get(f"{url}/health").json()["active"] == 0, within_s=60)
        assert plm.calls < _LEAST_CALLS


async def _leave(url: str, plm: FaultyPlm, streamed: bool) -> None:
    """Ask for a long answer, and hang up in the middle of it."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:

        async def ask() -> None:
            fields: dict[str, Any] = {
                "model": plm.card.name,
                "prompt": "the",
                "max_tokens": _TOKENS,
                "stream": streamed,
            }
            answer: Any = await client.completions.create(**fields)
            if streamed:
                async for _ in answer:
                    pass

        asking = asyncio.create_task(ask())
        await asyncio.to_thread(until, lambda: plm.calls == 3, within_s=60)
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking

"""The client's HTTP connection when the network misbehaves: what is asked again, how soon, and what is not."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import astuple
from email.utils import formatdate

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_owner_client.plm.connection import retries
from data_owner_client.plm.connection.base import Attempt
from data_owner_client.plm.connection.open import open_connection
from data_owner_client.plm.connection.rest import RestConnection
from data_owner_client.plm.connection.settings import ConnectionSettings
from protocol import errors
from protocol.codec import BINARY
from protocol.errors import PROBLEM_JSON, to_problem
from protocol.messages import DecodeRequest, DistributionRequest, DistributionResponse
from protocol.timing import ServerTiming

REQUEST = DecodeRequest(token_ids=[[5]], look_ahead=[0])
Answer = Callable[[httpx.Request], httpx.Response]


class Scripted:
    """Answers the first calls as told, and all further ones with the last answer."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = answers
        self.calls: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.calls.append(request)
        return self._answers[min(len(self.calls), len(self._answers)) - 1](request)


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, in seconds; they pass at once."""
    passed: list[float] = []
    monkeypatch.setattr(retries, "sleep_using_event", lambda _: passed.append)
    return passed


def connect(script: Scripted) -> RestConnection:
    return RestConnection("http://owner", transport=httpx.MockTransport(script))


def cut(request: httpx.Request) -> httpx.Response:
    raise httpx.RemoteProtocolError("peer closed connection without sending complete message body", request=request)


def refused(error: errors.PemaError) -> Answer:
    status = error.http_status
    return lambda _: httpx.Response(status, json=to_problem(error), headers={"Content-Type": PROBLEM_JSON})


def fine(_: httpx.Request) -> httpx.Response:
    return httpx.Response(200, content=b"{}", headers={"Content-Type": "text/html"})


def test_lost_connections_and_overload_are_asked_again(naps: list[float]) -> None:
    overloaded = errors.Overloaded("Full.", hint="Later.", retry_after_s=3.5)
    script = Scripted(cut, refused(overloaded), refused(errors.OverLimit("Too many.", hint="Fewer.")))
    with pytest.raises(errors.OverLimit):
        connect(script).decode(REQUEST)
    assert len(script.calls) == 3
    assert len({call.content for call in script.calls}) == 1
    assert len({call.headers["X-Request-Id"] for call in script.calls}) == 3
    assert naps[1] >= 3.5


def test_a_proxy_that_refuses_for_the_server_is_understood(naps: list[float]) -> None:
    busy = Scripted(
        lambda _: httpx.Response(503, text="<html>busy</html>", headers={"Retry-After": "7"}),
        lambda _: httpx.Response(429, headers={"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
        refused(errors.InvalidRequest("No.", hint="Ask otherwise.")),
    )
    with pytest.raises(errors.InvalidRequest):
        connect(busy).decode(REQUEST)
    assert naps[0] >= 7
    assert len(busy.calls) == 3


@pytest.mark.parametrize("date", ["Wed, 21 Oct 2026 07:28:00 GMT", None])
def test_a_gateway_may_say_the_time_of_the_next_attempt(naps: list[float], date: str | None) -> None:
    """Its own clock counts, if it shows it."""
    after = "Wed, 21 Oct 2026 07:28:30 GMT" if date else formatdate(time.time() + 30, usegmt=True)
    headers = {"Retry-After": after} | ({"Date": date} if date else {})
    no_date = {"Retry-After": "Wed, 21 Oct 99999999 07:28:00", "Date": "today"}
    script = Scripted(
        lambda _: httpx.Response(429, headers=headers),
        lambda _: httpx.Response(503, headers=no_date),
        refused(errors.InvalidRequest("No.", hint="Ask otherwise.")),
    )
    with pytest.raises(errors.InvalidRequest):
        connect(script).decode(REQUEST)
    assert 25 < naps[0] < 40
    assert naps[1] < 10


@pytest.mark.parametrize("error", [errors.InvalidRequest, errors.OverLimit, errors.ServerFault, errors.Unsupported])
def test_what_would_fail_again_is_not_asked_again(naps: list[float], error: type[errors.PemaError]) -> None:
    script = Scripted(refused(error("No.", hint="Do this.")))
    with pytest.raises(error) as caught:
        connect(script).decode(REQUEST)
    assert len(script.calls) == 1
    assert caught.value.hint == "Do this."
    assert caught.value.request_id == script.calls[0].headers["X-Request-Id"]


def test_a_server_that_is_not_there_is_said_at_once(naps: list[float]) -> None:
    script = Scripted(cut)
    with pytest.raises(errors.ConnectionFailed, match="http://owner") as caught:
        connect(script).model_card()
    assert len(script.calls) == 1
    assert "pema-server serve" in caught.value.hint


def stalled(request: httpx.Request) -> httpx.Response:
    raise httpx.ReadTimeout("timed out", request=request)


@pytest.mark.parametrize("lost", [stalled, cut])
def test_a_request_without_an_answer_is_repeated_before_it_is_divided(
    naps: list[float], lost: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "_MIN_LOST_SECONDS", 0.0)
    request = DecodeRequest(token_ids=[[5], [6], [7]], look_ahead=[0, 0, 0])
    script = Scripted(lost, lost, lost, lost, refused(errors.OverLimit("No.", hint="Less.")))
    with pytest.raises(errors.OverLimit):
        connect(script).decode(request)
    bodies = [DecodeRequest.from_bytes(call.content) for call in script.calls]
    assert [len(body.token_ids) for body in bodies] == [3, 3, 3, 3, 1]


def test_a_gateway_that_fails_once_fails_no_first_call(naps: list[float]) -> None:
    def answer(status: int) -> Answer:
        return lambda _: httpx.Response(status, json={"message": "Endpoint request timed out"})

    script = Scripted(answer(524), answer(502), refused(errors.OverLimit("No.", hint="Less.")))
    with pytest.raises(errors.OverLimit):
        connect(script).model_card()
    script = Scripted(answer(521))
    with pytest.raises(errors.GatewayFailed, match="HTTP 521"):
        connect(script).model_card()
    assert len(script.calls) == 3


@pytest.mark.parametrize(
    "answer",
    [
        fine,
        lambda _: httpx.Response(200, content=b"\0" * 40, headers={"Content-Type": BINARY}),
        lambda _: httpx.Response(200, content=b"<html>", headers={"Content-Type": "text/html"}),
    ],
)
def test_an_answer_of_another_form_is_a_violation(naps: list[float], answer: Answer) -> None:
    calls: list[tuple[Callable[[RestConnection], object], int]] = [
        (lambda c: c.decode(REQUEST), 3),
        (lambda c: c.model_card(), 1),
    ]
    for call, attempts in calls:
        script = Scripted(answer)
        with pytest.raises(errors.ProtocolViolation, match="did not answer in the form of this protocol"):
            call(connect(script))
        assert len(script.calls) == attempts


def test_a_garbled_answer_is_asked_for_again(naps: list[float]) -> None:
    data = DistributionResponse(digest="d", token_ids_K=torch.tensor([3]), logprob_K=torch.tensor([-0.5])).to_bytes()
    garbled = data[:-1] + bytes([data[-1] ^ 1])

    def answering(body: bytes) -> Answer:
        return lambda _: httpx.Response(200, content=body, headers={"Content-Type": BINARY})

    script = Scripted(answering(garbled), answering(data))
    assert connect(script).distribution(DistributionRequest(text="a")).to_bytes() == data
    assert len(script.calls) == 2


def test_observers_are_told_of_every_exchange(naps: list[float]) -> None:
    body = b'{"digest": "d", "token_ids_K": [3], "logprob_K": [-0.5]}'
    headers = {"Content-Type": "application/json", "Server-Timing": "queue;dur=1.5, compute;dur=20, serialise;dur=0.25"}
    overloaded = refused(errors.Overloaded("Full.", hint="Later.", retry_after_s=0.5))
    script = Scripted(overloaded, cut, overloaded, lambda _: httpx.Response(200, content=body, headers=headers))
    connection, seen = connect(script), list[Attempt]()
    connection.observers.append(seen.append)
    connection.distribution(DistributionRequest(text="a"))
    assert [exchange.refused for exchange in seen] == [True, True, False]
    assert {exchange.call for exchange in seen} == {"POST /v1/next-token-distribution"}
    assert [exchange.request_id for exchange in seen] == [script.calls[i].headers["X-Request-Id"] for i in (0, 2, 3)]
    assert [exchange.timing for exchange in seen] == [None, None, ServerTiming(1.5, 20.0, 0.25)]


def test_time_is_counted_from_the_first_failure_and_never_overdrawn(naps: list[float]) -> None:
    late = refused(errors.Overloaded("Full.", hint="Later.", retry_after_s=86400.0))
    script = Scripted(late)
    with pytest.raises(errors.Overloaded):
        connect(script).decode(REQUEST)
    assert len(script.calls) == 1  # it would be too late by then
    assert naps == []


@pytest.mark.parametrize("retry_after", ["Infinity", "-1", "1e999", '"soon"', "[]"])
def test_a_retry_after_that_is_none_is_ignored(naps: list[float], retry_after: str) -> None:
    problem = (
        json.dumps(to_problem(errors.Overloaded("Full."))).removesuffix("}") + f', "retry_after_s": {retry_after}}}'
    )
    script = Scripted(
        lambda _: httpx.Response(429, content=problem.encode(), headers={"Content-Type": PROBLEM_JSON}),
        refused(errors.OverLimit("No.", hint="Less.")),
    )
    with pytest.raises(errors.OverLimit):
        connect(script).decode(REQUEST)
    assert all(0 <= nap <= 10 for nap in naps)


def test_what_was_garbled_on_its_way_to_the_server_is_sent_again(naps: list[float]) -> None:
    script = Scripted(refused(errors.MalformedMessage("Not well-formed.", hint="Send it well-formed.")))
    with pytest.raises(errors.MalformedMessage):
        connect(script).decode(REQUEST)
    assert len(script.calls) == 3
    assert len({call.content for call in script.calls}) == 1


def test_refusals_do_not_use_up_the_attempts_for_garbled_answers(naps: list[float]) -> None:
    overloaded = refused(errors.Overloaded("Full.", hint="Later.", retry_after_s=0.1))
    garbled = fine
    script = Scripted(overloaded, overloaded, overloaded, garbled, garbled, refused(errors.OverLimit("No.", hint="")))
    with pytest.raises(errors.OverLimit):
        connect(script).decode(REQUEST)


def test_a_closed_connection_is_not_tried_again(naps: list[float]) -> None:
    script = Scripted(cut)
    connection = connect(script)
    connection.close()
    with pytest.raises(errors.InvalidRequest, match="closed"):
        connection.decode(REQUEST)
    assert script.calls == []


def test_an_answer_that_drips_is_bounded_as_a_whole() -> None:
    def dripping(_: httpx.Request) -> httpx.Response:
        def parts() -> Iterator[bytes]:
            for _ in range(100):
                time.sleep(0.05)
                yield b" "

        return httpx.Response(200, content=parts(), headers={"Content-Type": "application/json"})

    connection = RestConnection(
        "http://owner", ConnectionSettings(timeout=0.2, retry_for=0), transport=httpx.MockTransport(Scripted(dripping))
    )
    started = time.perf_counter()
    with pytest.raises(errors.ConnectionFailed, match="ReadTimeout"):
        connection.decode(REQUEST)
    assert time.perf_counter() - started < 3  # of five


@pytest.mark.parametrize("header", ["", "cache;desc=hit", "queue;dur=1", "queue;dur=x, compute;dur=1, serialise;dur=1"])
def test_a_timing_of_another_kind_is_none(header: str) -> None:
    assert ServerTiming.from_header(header) is None


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_timing_survives_its_header(queue_ms: float, compute_ms: float, serialise_ms: float) -> None:
    timing = ServerTiming(queue_ms, compute_ms, serialise_ms)
    read = ServerTiming.from_header(timing.to_header())
    assert read is not None
    assert astuple(read) == pytest.approx(astuple(timing), abs=1e-3)


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://127.8.9.1", True),
        ("http://[::1]:8000", True),
        ("grpc://localhost:8001", True),
        ("https://plm.example.com", True),
        ("grpcs://plm.example.com:443", True),
        ("http://plm.example.com", False),
        ("http://localhost.example.com", False),
        ("http://127.0.0.1.example.com:8000", False),
        ("grpc://10.0.0.1:8001", False),
        ("grpc://127.0.0.1.:8001", True),
        ("http://plm.localhost", True),
    ],
)
def test_a_key_does_not_travel_in_the_clear(url: str, allowed: bool) -> None:
    with nullcontext() if allowed else pytest.raises(errors.InvalidRequest, match="in the clear"):
        open_connection(url, api_key="secret-key").close()
    open_connection(url, api_key="secret-key", insecure=True).close()
    open_connection(url).close()


def test_json_answers_are_understood() -> None:
    distribution = b'{"digest": "d", "token_ids_K": [3], "logprob_K": [-0.5], "tokens": ["x"]}'
    script = Scripted(lambda _: httpx.Response(200, content=distribution, headers={"Content-Type": "application/json"}))
    answer = connect(script).distribution(DistributionRequest(text="a", top_k=1))
    assert isinstance(answer, DistributionResponse)
    assert answer.token_ids_K.tolist() == [3]


def test_a_compressed_answer_is_not_inflated(naps: list[float]) -> None:
    def compressed(request: httpx.Request) -> httpx.Response:
        assert request.headers["accept-encoding"] == "identity"
        headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
        return httpx.Response(200, headers=headers, stream=httpx.ByteStream(gzip.compress(b" " * 2**24)))

    with pytest.raises(errors.ProtocolViolation):
        connect(Scripted(compressed)).model_card()

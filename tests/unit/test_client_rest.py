"""The client's HTTP connection when the network misbehaves: what is asked again, how soon, and what is not."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
import tenacity

from data_owner_client.connection.rest import RestConnection
from protocol import errors
from protocol.codec import BINARY
from protocol.errors import PROBLEM_JSON, to_problem
from protocol.messages import DecodeRequest, DistributionRequest, DistributionResponse

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
    monkeypatch.setattr(tenacity.nap.time, "sleep", passed.append)
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


@pytest.mark.parametrize(
    "answer",
    [
        fine,
        lambda _: httpx.Response(200, content=b"\0" * 40, headers={"Content-Type": BINARY}),
        lambda _: httpx.Response(200, content=b"<html>", headers={"Content-Type": "text/html"}),
    ],
)
def test_an_answer_of_another_form_is_a_violation(naps: list[float], answer: Answer) -> None:
    with pytest.raises(errors.ProtocolViolation, match="did not answer in the form of this protocol"):
        connect(Scripted(answer)).decode(REQUEST)


def test_json_answers_are_understood() -> None:
    distribution = b'{"digest": "d", "token_ids_K": [3], "logprob_K": [-0.5], "tokens": ["x"]}'
    script = Scripted(lambda _: httpx.Response(200, content=distribution, headers={"Content-Type": "application/json"}))
    answer = connect(script).distribution(DistributionRequest(text="a", top_k=1))
    assert isinstance(answer, DistributionResponse)
    assert answer.token_ids_K.tolist() == [3]

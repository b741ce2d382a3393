"""The calls over HTTP."""

from __future__ import annotations

import json
import uuid
from typing import TypeVar

import httpx

from data_owner_client.connection.base import Observer
from data_owner_client.connection.retries import GIVE_UP_AFTER_S, answered
from protocol.codec import BINARY, JSON, Message
from protocol.errors import ConnectionFailed, NotReady, PemaError, ProtocolViolation, from_problem
from protocol.messages import (
    DecodeRequest,
    DecodeResponse,
    DistributionRequest,
    DistributionResponse,
    EncodeRequest,
    EncodeResponse,
    HeadRequest,
    HeadRows,
    ModelCard,
    TokenizerBundle,
)
from protocol.timing import ServerTiming

_Answer = TypeVar("_Answer", bound=Message)
_REQUEST_ID = "X-Request-Id"
_CONNECT_TIMEOUT_S = 10.0


class RestConnection:
    """HTTP connection to a PLM server; thread-safe. What failed on the way is asked again (`retries`).

    Args:
        url: where the server listens, for example `http://127.0.0.1:8000`.
        api_key: sent with every call.
        timeout_s: longest wait for an answer, in seconds.
        give_up_after_s: how long a call that fails on the way is made again, in seconds.
        transport: what carries the requests instead of sockets, for tests.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        give_up_after_s: float = GIVE_UP_AFTER_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.observers: list[Observer] = []
        self._url = url
        self._give_up_after_s = give_up_after_s
        timeout = httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S)
        # The server is fair between clients, which may share an address.
        headers = {"X-Pema-Client": uuid.uuid4().hex}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        self._http = httpx.Client(base_url=url, timeout=timeout, transport=transport, headers=headers)

    def close(self) -> None:
        """Close the sockets."""
        self._http.close()

    def model_card(self) -> ModelCard:
        # The first call of every command: a server that is not there should be said at once, not after a minute.
        return self._call("GET", "/v1/model", ModelCard, unless_gone=True)

    def tokenizer(self) -> TokenizerBundle:
        return self._call("GET", "/v1/tokenizer", TokenizerBundle)

    def lm_head(self, request: HeadRequest) -> HeadRows:
        if request.token_ids is not None:
            return self._call("POST", "/v1/lm-head", HeadRows, request)
        parameters = httpx.QueryParams(request.model_dump(include={"start", "stop", "dtype"}, exclude_none=True))
        return self._call("GET", f"/v1/lm-head?{parameters}", HeadRows)

    def encode(self, request: EncodeRequest) -> EncodeResponse:
        return self._call("POST", "/v1/encode", EncodeResponse, request)

    def decode(self, request: DecodeRequest) -> DecodeResponse:
        return self._call("POST", "/v1/decode", DecodeResponse, request)

    def distribution(self, request: DistributionRequest) -> DistributionResponse:
        return self._call("POST", "/v1/next-token-distribution", DistributionResponse, request)

    def _call(
        self,
        method: str,
        path: str,
        answer: type[_Answer],
        request: Message | None = None,
        *,
        unless_gone: bool = False,
    ) -> _Answer:
        body = None if request is None else request.to_bytes()

        def attempt(request_id: str) -> tuple[_Answer, ServerTiming | None]:
            return self._attempt(method, path, answer, body, request_id)

        return answered(
            f"{method} {path}",
            attempt,
            self.observers,
            give_up_after_s=self._give_up_after_s,
            unless_gone=unless_gone,
        )

    def _attempt(
        self, method: str, path: str, answer: type[_Answer], body: bytes | None, request_id: str
    ) -> tuple[_Answer, ServerTiming | None]:
        headers = {"Accept": f"{BINARY}, {JSON};q=0.5", _REQUEST_ID: request_id}
        if body is not None:
            headers["Content-Type"] = BINARY
        try:
            response = self._http.request(method, path, content=body, headers=headers)
        except httpx.RequestError as error:
            slow = isinstance(error, httpx.ReadTimeout)
            raise ConnectionFailed(
                f"No answer from {self._url} ({type(error).__name__}).",
                hint="The server is too slow or hangs; ask its owner."
                if slow
                else "Is the address right and the server running? It starts with: pema-server serve",
                request_id=request_id,
            ) from error
        if not response.is_success:
            raise _problem(response, request_id)
        timing = ServerTiming.from_header(response.headers.get("server-timing", ""))
        try:
            if response.headers.get("content-type", "").startswith(BINARY):
                return answer.from_bytes(response.content), timing
            return answer.from_json(response.content), timing
        except PemaError as error:
            raise ProtocolViolation(
                f"{self._url}{path} did not answer in the form of this protocol.",
                hint="Is this a PEMA server of the same version, or a proxy in front of it?",
                request_id=request_id,
            ) from error


def _problem(response: httpx.Response, request_id: str) -> PemaError:
    try:
        problem = json.loads(response.content)
    except ValueError:
        problem = {}
    if not isinstance(problem, dict):
        problem = {}
    error = from_problem(problem, response.status_code)
    error.request_id = error.request_id or request_id
    # A proxy in front of the server refuses without our problem document.
    if not problem and response.status_code in (429, 502, 503, 504):
        after = response.headers.get("retry-after", "")
        return NotReady(
            f"The server answered HTTP {response.status_code}.",
            hint="Try again later.",
            retry_after_s=float(after) if after.isdecimal() else None,
        )
    return error

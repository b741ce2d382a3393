"""The calls over REST."""

from __future__ import annotations

import json
import ssl
import time
import uuid
from pathlib import Path
from typing import TypeVar

import httpx

from data_owner_client.plm.connection.base import unreachable_hint, untrusted_error
from data_owner_client.plm.connection.retries import Retrier
from data_owner_client.plm.connection.settings import DEFAULT_CONNECTION, ConnectionSettings
from protocol.addresses import is_loopback
from protocol.codec import BINARY, JSON, Message
from protocol.errors import ConnectionFailed, NotReady, Overloaded, PemaError, ProtocolViolation, from_problem
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
from protocol.rate_limits import RATE_LIMIT, RATE_LIMIT_POLICY, RateLimitStatus, from_fields
from protocol.timing import ServerTiming

_Answer = TypeVar("_Answer", bound=Message)
_REQUEST_ID = "X-Request-Id"
_CONNECT_TIMEOUT_SECONDS = 10.0
_PROXY_ERRORS: dict[int, type[PemaError]] = {
    429: Overloaded,
    502: ConnectionFailed,
    503: NotReady,
    504: ConnectionFailed,
}


class RestConnection:
    """HTTP connection to a PLM server; thread-safe. Failed calls are repeated (`retries`).

    Args:
        url: URL of the server, for example `http://127.0.0.1:8000`.
        settings: key, certificates, time-out and retries.
        transport: replacement of the sockets, for tests; None for sockets.
    """

    def __init__(
        self,
        url: str,
        settings: ConnectionSettings = DEFAULT_CONNECTION,
        *,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._url = url
        self._timeout_s = settings.timeout
        self._retrier = Retrier(settings.retry_for)
        self.observers = self._retrier.observers
        self.rate_limits: tuple[RateLimitStatus, ...] = ()
        timeout = httpx.Timeout(settings.timeout, connect=min(settings.timeout, _CONNECT_TIMEOUT_SECONDS))
        # The id lets the server be fair between clients, which may share an address.
        # No compression: a small answer could expand to a large one.
        headers = {"X-Pema-Client": uuid.uuid4().hex, "Accept-Encoding": "identity"}
        if settings.api_key:
            headers["Authorization"] = f"Bearer {settings.api_key}"
        self._http = httpx.Client(
            base_url=url,
            timeout=timeout,
            transport=transport,
            headers=headers,
            verify=_context(settings.ca, settings.client_certificate, settings.client_key),
            # Calls to this machine need no proxy, which would see the key.
            trust_env=not is_loopback(url),
        )

    def close(self) -> None:
        """Close the sockets."""
        self._retrier.close()
        self._http.close()

    def model_card(self) -> ModelCard:
        # The first call of every command: an unreachable server is reported at once, not after a minute.
        return self._call("GET", "/v1/model", ModelCard, fail_fast=True)

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
        fail_fast: bool = False,
    ) -> _Answer:
        body = None if request is None else request.to_bytes()

        def attempt(request_id: str) -> tuple[_Answer, ServerTiming | None]:
            return self._attempt(method, path, answer, body, request_id)

        return self._retrier.call(f"{method} {path}", attempt, fail_fast=fail_fast)

    def _attempt(
        self, method: str, path: str, answer: type[_Answer], body: bytes | None, request_id: str
    ) -> tuple[_Answer, ServerTiming | None]:
        headers = {"Accept": f"{BINARY}, {JSON};q=0.5", _REQUEST_ID: request_id}
        if body is not None:
            headers["Content-Type"] = BINARY
        try:
            response = self._whole_response(method, path, body, headers)
        except (httpx.RequestError, httpx.InvalidURL) as error:
            if (reason := _certificate_error(error)) is not None:
                raise untrusted_error(self._url, reason, request_id) from error
            raise ConnectionFailed(
                f"No answer from {self._url} ({type(error).__name__}).",
                hint=unreachable_hint(self._url, slow=isinstance(error, httpx.ReadTimeout)),
                request_id=request_id,
            ) from error
        if (left := response.headers.get(RATE_LIMIT)) is not None:
            self.rate_limits = from_fields(left, response.headers.get(RATE_LIMIT_POLICY, ""))
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

    def _whole_response(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> httpx.Response:
        """Read the whole response. httpx bounds the wait for each part; this bounds their sum."""
        deadline = time.monotonic() + self._timeout_s
        with self._http.stream(method, path, content=body, headers=headers) as response:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise ProtocolViolation(
                    f"{self._url}{path} sent a compressed answer, which was not requested.",
                    hint="Is there a proxy in front of the server?",
                    request_id=headers[_REQUEST_ID],
                )
            parts = []
            for part in response.iter_bytes():
                parts.append(part)
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the answer is too slow", request=response.request)
            return httpx.Response(
                response.status_code, headers=response.headers, content=b"".join(parts), request=response.request
            )


def _problem(response: httpx.Response, request_id: str) -> PemaError:
    try:
        problem = json.loads(response.content)
    except ValueError:
        problem = None
    if not isinstance(problem, dict) and response.status_code in _PROXY_ERRORS:
        # A proxy in front of the server refuses without a problem document of this protocol.
        after = response.headers.get("retry-after", "")
        error = _PROXY_ERRORS[response.status_code](
            f"Something in front of the server answered HTTP {response.status_code}.",
            hint="Try again later, or ask the server's owner.",
            retry_after_s=float(after) if after.isdecimal() else None,
        )
    else:
        error = from_problem(problem, response.status_code)
    error.request_id = error.request_id or request_id
    return error


def _context(ca: Path | None, certificate: Path | None, key: Path | None) -> ssl.SSLContext:
    context = httpx.create_ssl_context() if ca is None else ssl.create_default_context(cafile=ca)
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context


def _certificate_error(error: BaseException | None) -> str | None:
    """The reason why the server's certificate was rejected; None if the error is another one."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return None if error is None else error.verify_message

"""The calls over REST."""

from __future__ import annotations

import json
import ssl
import time
import uuid
from contextlib import closing
from email.utils import parsedate_to_datetime
from typing import TypeVar

import httpx

from data_owner_client.plm.connection.division import RequestDivision
from data_owner_client.plm.connection.network.route import Route
from data_owner_client.plm.connection.network.trust import client_context
from data_owner_client.plm.connection.retries import Retrier
from data_owner_client.plm.connection.settings import DEFAULT_CONNECTION, ConnectionSettings
from protocol.codec import BINARY, JSON, Message
from protocol.errors import (
    AnswerLost,
    ConnectionFailed,
    InvalidRequest,
    PemaError,
    ProtocolViolation,
    TimedOut,
    from_problem,
    is_problem,
)
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
# httpx's errors before a request is sent: the server has not seen it.
_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError, httpx.UnsupportedProtocol)


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
        self._route = Route.find(url, settings)
        self._retrier = Retrier(settings)
        self._division = RequestDivision(settings)
        self.observers = self._retrier.observers
        self.rate_limits: tuple[RateLimitStatus, ...] = ()
        self._http = _http_client(self._route, settings, transport)

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
        return self._division.head(request, self._lm_head)

    def _lm_head(self, request: HeadRequest, divisible: bool) -> HeadRows:
        if request.token_ids is not None:
            return self._call("POST", "/v1/lm-head", HeadRows, request, divisible=divisible)
        parameters = httpx.QueryParams(request.model_dump(include={"start", "stop", "dtype"}, exclude_none=True))
        return self._call("GET", f"/v1/lm-head?{parameters}", HeadRows, divisible=divisible)

    def encode(self, request: EncodeRequest) -> EncodeResponse:
        return self._division.rows(
            request,
            lambda part, divisible: self._call("POST", "/v1/encode", EncodeResponse, part, divisible=divisible),
        )

    def decode(self, request: DecodeRequest) -> DecodeResponse:
        return self._division.rows(
            request,
            lambda part, divisible: self._call("POST", "/v1/decode", DecodeResponse, part, divisible=divisible),
        )

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
        divisible: bool = False,
    ) -> _Answer:
        body = None if request is None else request.to_bytes()

        def attempt(request_id: str, timeout_s: float) -> tuple[_Answer, ServerTiming | None]:
            headers = {"Accept": f"{BINARY}, {JSON};q=0.5", _REQUEST_ID: request_id}
            if body is not None:
                headers["Content-Type"] = BINARY
            request = self._http.build_request(
                method, path.lstrip("/"), content=body, headers=headers, timeout=_timeout(timeout_s)
            )
            return self._attempt(request, path, answer, timeout_s)

        return self._retrier.call(f"{method} {path}", attempt, fail_fast=fail_fast, divisible=divisible)

    def _attempt(
        self, request: httpx.Request, path: str, answer: type[_Answer], timeout_s: float
    ) -> tuple[_Answer, ServerTiming | None]:
        request_id = request.headers[_REQUEST_ID]
        try:
            response = self._whole_response(request, timeout_s)
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise self._error_for(error, request_id) from error
        if (left := response.headers.get(RATE_LIMIT)) is not None:
            self.rate_limits = from_fields(left, response.headers.get(RATE_LIMIT_POLICY, ""))
        if not response.is_success:
            raise self._problem(response, request_id, path)
        if response.headers.get("content-encoding", "identity") != "identity":
            raise ProtocolViolation(
                f"{self._route.address.url}{path} sent a compressed answer, which was not requested.",
                hint="Is there a proxy in front of the server?",
                request_id=request_id,
            )
        timing = ServerTiming.from_header(response.headers.get("server-timing", ""))
        try:
            if response.headers.get("content-type", "").startswith(BINARY):
                return answer.from_bytes(response.content), timing
            return answer.from_json(response.content), timing
        except PemaError as error:
            raise self._route.malformed(request_id, path) from error

    def _whole_response(self, request: httpx.Request, timeout_s: float) -> httpx.Response:
        """Read the whole response, without what was compressed.

        httpx bounds the wait for each part; this bounds their sum.
        """
        deadline = time.monotonic() + timeout_s
        response = self._http.send(request, stream=True)
        with closing(response):
            parts = []
            is_compressed = response.headers.get("content-encoding", "identity") != "identity"
            for part in () if is_compressed else response.iter_bytes():
                parts.append(part)
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the answer is too slow", request=request)
            return httpx.Response(
                response.status_code, headers=response.headers, content=b"".join(parts), request=request
            )

    def _error_for(self, error: Exception, request_id: str) -> PemaError:
        """The error for a call without a whole response."""
        if (reason := _certificate_error(error)) is not None:
            return self._route.untrusted(reason, request_id)
        if isinstance(error, httpx.ProxyError):
            refusal = self._route.proxy_error(str(error), request_id)
            if refusal is not None:
                return refusal
        kind: type[ConnectionFailed] = AnswerLost
        if isinstance(error, _UNSENT):
            kind = ConnectionFailed
        elif isinstance(error, httpx.TimeoutException):
            kind = TimedOut
        return self._route.no_answer(error, type(error).__name__, request_id, kind)

    def _problem(self, response: httpx.Response, request_id: str, path: str) -> PemaError:
        try:
            problem = json.loads(response.content)
        except ValueError:
            problem = None
        if is_problem(problem):
            error = from_problem(problem, response.status_code, request_id)
            if response.status_code == httpx.codes.NOT_FOUND and self._route.address.path:
                error.hint = self._route.path_hint
            return error
        location = response.headers.get("location", "")
        return self._route.gateway_error(
            response.status_code,
            request_id,
            retry_after_s=_retry_after_s(response.headers),
            location=str(response.request.url.join(location)) if location else "",
            path=path,
        )


def _retry_after_s(headers: httpx.Headers) -> float | None:
    """Seconds after which a gateway wants to be asked again, which it may also give as a date; None if unknown."""
    after = headers.get("retry-after", "")
    if after.isdecimal():
        return float(after)
    moment = _unix_time(after)
    if moment is None:
        return None
    now = _unix_time(headers.get("date", ""))  # by the gateway's clock, which gave the other date
    return max(0.0, moment - (time.time() if now is None else now))


def _unix_time(date: str) -> float | None:
    """Seconds since 1970 of a date in a header; None if it is none."""
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return None


def _http_client(route: Route, settings: ConnectionSettings, transport: httpx.BaseTransport | None) -> httpx.Client:
    # The id lets the server be fair between clients, which may share an address.
    # No compression: a small answer could expand to a large one.
    headers = {"X-Pema-Client": uuid.uuid4().hex, "Accept-Encoding": "identity"}
    if settings.api_key:
        headers["Authorization"] = f"Bearer {settings.api_key}"
    context = client_context(route.roots, settings.client_certificate, settings.client_key)
    proxy = None
    if route.proxy is not None and transport is None:
        proxy = httpx.Proxy(route.proxy.url, ssl_context=context if route.proxy.scheme == "https" else None)
    try:
        # The route has the proxy and the roots of the environment.
        return httpx.Client(
            base_url=route.address.url,
            headers=headers,
            proxy=proxy,
            transport=transport,
            verify=context,
            trust_env=False,
        )
    except ImportError as error:
        raise InvalidRequest(
            f"The {route.proxy} needs a package that is not installed.",
            hint="Install it (pip install 'httpx[socks]'), or reach the server without a proxy: "
            f"NO_PROXY={route.address.host}.",
        ) from error


def _timeout(seconds: float) -> httpx.Timeout:
    return httpx.Timeout(seconds, connect=min(seconds, _CONNECT_TIMEOUT_SECONDS))


def _certificate_error(error: BaseException | None) -> str | None:
    """The reason why the server's certificate was rejected; None if the error is another one."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return None if error is None else error.verify_message

"""The calls over gRPC."""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import grpc

from data_owner_client.plm.connection.division import RequestDivision
from data_owner_client.plm.connection.network.route import Route
from data_owner_client.plm.connection.retries import Retrier
from data_owner_client.plm.connection.settings import DEFAULT_CONNECTION, ConnectionSettings
from protocol import pema_pb2, pema_pb2_grpc
from protocol.chunks import join_head, join_rows
from protocol.errors import (
    AnswerLost,
    ConnectionFailed,
    Forbidden,
    NotReady,
    PayloadTooLarge,
    PemaError,
    ProtocolViolation,
    TimedOut,
    Unauthenticated,
    from_problem,
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
from protocol.protobuf import (
    CLIENT_METADATA,
    KEY_METADATA,
    PROBLEM_METADATA,
    RATE_LIMIT_METADATA,
    RATE_LIMIT_POLICY_METADATA,
    REQUEST_ID_METADATA,
    from_proto,
    to_proto,
)
from protocol.rate_limits import RateLimitStatus, from_fields
from protocol.timing import ServerTiming

_Result = TypeVar("_Result")
_Answer = TypeVar("_Answer", EncodeResponse, DecodeResponse)
_OPTIONS = [
    # Chunks have about a MiB, but a sequence is never divided, and a long one at a large D is larger.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # No compression: a small answer could expand to a large one.
    ("grpc.compression_enabled_algorithms_bitset", 1 << grpc.Compression.NoCompression),
    # A call may compute for minutes without a byte on the wire. Proxies drop connections that seem idle, often after a
    # minute. Without the last of these options, gRPC would ping less and less often.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Without this, a new channel to the server would share the dead connection of the one that it replaces.
    ("grpc.use_local_subchannel_pool", 1),
]
# gRPC's messages about certificates of another CA or name.
_CERTIFICATE_ERROR = re.compile(r"(?:CERTIFICATE_VERIFY_FAILED: |(?=Hostname Verification|Peer name))([^;\"]+)")
# gRPC's messages about an answer that comes from a gateway of HTTP, and before a request is sent.
_HTTP_STATUS = re.compile(r"Received http2 header with status: (\d{3})")
_UNSENT = re.compile("failed to connect|errors? resolving|resolution failed")
# Refusals without a problem document, which the server would send.
_GATEWAY_REFUSALS: dict[grpc.StatusCode, tuple[type[PemaError], str]] = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: (PayloadTooLarge, "The request is larger than the server takes"),
    grpc.StatusCode.UNIMPLEMENTED: (ProtocolViolation, "The server does not know this call"),
    grpc.StatusCode.UNAUTHENTICATED: (Unauthenticated, "Something in front of the server wants another key"),
    grpc.StatusCode.PERMISSION_DENIED: (Forbidden, "Something in front of the server does not allow the call"),
}
_REFUSAL_HINT = "Is this the address of a PEMA server of the same version? Otherwise ask its owner."
_Attempt = dict[str, Any]  # the arguments of one attempt: time-out and metadata
_Fetch = Callable[[Any, _Attempt], tuple[_Result, ServerTiming | None]]


@dataclass(frozen=True)
class _ChannelAndStub:
    """A channel and its stub, which belong together."""

    channel: grpc.Channel
    stub: Any


class GrpcConnection:
    """gRPC connection to a PLM server; thread-safe.

    Args:
        url: URL of the server: `grpc://host:port`, or `grpcs://host:port` for TLS.
        settings: key, certificates, time-out and retries.
    """

    def __init__(
        self,
        url: str,
        settings: ConnectionSettings = DEFAULT_CONNECTION,
    ) -> None:
        self._route = Route.find(url, settings)
        self._retrier = Retrier(settings)
        self._division = RequestDivision(settings)
        self.observers = self._retrier.observers
        self.rate_limits: tuple[RateLimitStatus, ...] = ()
        # The id lets the server be fair between clients, which may share an address.
        self._metadata: tuple[tuple[str, str], ...] = ((CLIENT_METADATA, uuid.uuid4().hex),)
        if settings.api_key:
            self._metadata += ((KEY_METADATA, f"Bearer {settings.api_key}"),)
        self._credentials = _credentials(self._route, settings)
        self._channel_lock = threading.Lock()
        self._current = self._open_channel()

    def close(self) -> None:
        """Close the channel."""
        self._retrier.close()
        with self._channel_lock:
            self._current.channel.close()

    def model_card(self) -> ModelCard:
        def fetch(stub: Any, attempt: _Attempt) -> ModelCard:
            card, call = stub.GetModelCard.with_call(pema_pb2.GetModelCardRequest(), **attempt)
            self._record_rate_limits(call)
            return from_proto(card, ModelCard)

        # The first call of every command: an unreachable server is reported at once, not after a minute.
        return self._call("GetModelCard", _untimed(fetch), fail_fast=True)

    def tokenizer(self) -> TokenizerBundle:
        def fetch(stub: Any, attempt: _Attempt) -> TokenizerBundle:
            call = stub.GetTokenizer(pema_pb2.GetTokenizerRequest(), **attempt)
            chunks = list(call)
            self._record_rate_limits(call)
            return TokenizerBundle.from_json(b"".join(chunk.data for chunk in chunks))

        return self._call("GetTokenizer", _untimed(fetch))

    def lm_head(self, request: HeadRequest) -> HeadRows:
        return self._division.head(request, self._lm_head)

    def _lm_head(self, request: HeadRequest, divisible: bool) -> HeadRows:
        proto = to_proto(request, pema_pb2.HeadRequest())

        def fetch(stub: Any, attempt: _Attempt) -> HeadRows:
            call = stub.GetLmHead(proto, **attempt)
            chunks = [from_proto(chunk, HeadRows) for chunk in call]
            self._record_rate_limits(call)
            return join_head(chunks)

        return self._call("GetLmHead", _untimed(fetch), divisible=divisible)

    def encode(self, request: EncodeRequest) -> EncodeResponse:
        return self._division.rows(request, self._encode)

    def _encode(self, request: EncodeRequest, divisible: bool) -> EncodeResponse:
        call = pema_pb2.EncodeCall(request=to_proto(request, pema_pb2.EncodeRequest()))

        def fetch(stub: Any, attempt: _Attempt) -> tuple[EncodeResponse, ServerTiming | None]:
            return self._rows(stub.Encode, call, EncodeResponse, attempt)

        return self._call("Encode", fetch, divisible=divisible)

    def decode(self, request: DecodeRequest) -> DecodeResponse:
        return self._division.rows(request, self._decode)

    def _decode(self, request: DecodeRequest, divisible: bool) -> DecodeResponse:
        call = pema_pb2.DecodeCall(request=to_proto(request, pema_pb2.DecodeRequest()))

        def fetch(stub: Any, attempt: _Attempt) -> tuple[DecodeResponse, ServerTiming | None]:
            return self._rows(stub.Decode, call, DecodeResponse, attempt)

        return self._call("Decode", fetch, divisible=divisible)

    def distribution(self, request: DistributionRequest) -> DistributionResponse:
        proto = to_proto(request, pema_pb2.DistributionRequest())

        def fetch(stub: Any, attempt: _Attempt) -> DistributionResponse:
            answer, call = stub.GetNextTokenDistribution.with_call(proto, **attempt)
            self._record_rate_limits(call)
            return from_proto(answer, DistributionResponse)

        return self._call("GetNextTokenDistribution", _untimed(fetch))

    def _call(self, name: str, fetch: _Fetch[_Result], *, fail_fast: bool = False, divisible: bool = False) -> _Result:
        return self._retrier.call(
            f"gRPC {name}", partial(self._attempt, fetch), fail_fast=fail_fast, divisible=divisible
        )

    def _open_channel(self) -> _ChannelAndStub:
        target, proxy = self._route.address.authority, self._route.proxy
        # The route has the proxy of the environment.
        options = [*_OPTIONS, ("grpc.enable_http_proxy", 0) if proxy is None else ("grpc.http_proxy", proxy.url)]
        if self._credentials is None:
            channel = grpc.insecure_channel(target, options)
        else:
            channel = grpc.secure_channel(target, self._credentials, options)
        return _ChannelAndStub(channel, pema_pb2_grpc.PlmStub(channel))  # type: ignore[no-untyped-call]

    def _replace_channel(self, old: _ChannelAndStub) -> None:
        """Open another channel after a time-out, as the connection may be dead, or where the server is not ready.

        Every retry would use the old connection, though a load balancer may give a new one to another server.
        The old channel is not closed, because other calls may still be answered on it. It goes with the last of them.
        """
        with self._channel_lock:
            if old is self._current:
                self._current = self._open_channel()

    def _attempt(
        self, fetch: _Fetch[_Result], request_id: str, timeout_s: float
    ) -> tuple[_Result, ServerTiming | None]:
        current, metadata = self._current, ((REQUEST_ID_METADATA, request_id), *self._metadata)
        try:
            return fetch(current.stub, {"timeout": timeout_s, "metadata": metadata})
        except grpc.RpcError as error:
            failure = self._error_for(error, request_id)
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED or isinstance(failure, NotReady):
                self._replace_channel(current)
            raise failure from error
        except PemaError as error:
            if isinstance(error, NotReady):
                self._replace_channel(current)
            # An error from the server is a problem with the request's id. All others mean that the answer could not be
            # read.
            if error.request_id is not None:
                raise
            raise self._route.malformed(request_id) from error
        except (ValueError, TypeError, LookupError, RuntimeError) as error:
            raise self._route.malformed(request_id) from error

    def _record_rate_limits(self, call: Any) -> None:
        metadata = dict(call.trailing_metadata() or ())
        if RATE_LIMIT_METADATA in metadata:
            self.rate_limits = from_fields(metadata[RATE_LIMIT_METADATA], metadata.get(RATE_LIMIT_POLICY_METADATA, ""))

    def _rows(
        self, open_stream: Any, call: Any, answer: type[_Answer], attempt: _Attempt
    ) -> tuple[_Answer, ServerTiming | None]:
        """Make one call on a new stream, and join the chunks of its answer."""
        call.request_id = dict(attempt["metadata"])[REQUEST_ID_METADATA]
        stream, chunks = open_stream(iter([call]), **attempt), []
        for chunk in stream:
            if chunk.HasField("problem"):
                self._record_rate_limits(stream)  # waits for the end of the stream, which follows
                problem = {field.name: value for field, value in chunk.problem.ListFields()}
                raise from_problem(problem, chunk.problem.status, call.request_id)
            chunks.append(from_proto(chunk.rows, answer))
            if chunk.last:
                timing = chunk.timing
                self.rate_limits = from_fields(chunk.quotas.rate_limit, chunk.quotas.rate_limit_policy)
                return join_rows(chunks), ServerTiming(timing.queue_ms, timing.compute_ms, timing.serialise_ms)
        raise ProtocolViolation(
            "The server ended an answer in its middle.",
            hint="Nothing was stored; try again.",
            request_id=call.request_id,
        )

    def _error_for(self, error: Any, request_id: str) -> PemaError:
        """The error of a call: the server's if it sent a problem, otherwise one that follows from the status."""
        self._record_rate_limits(error)
        problem = dict(error.trailing_metadata() or ()).get(PROBLEM_METADATA)
        if problem is not None:
            with suppress(ValueError):
                return from_problem(json.loads(problem), 500, request_id)
        status, details = error.code(), error.details() or ""
        if (http_status := _HTTP_STATUS.search(details)) is not None:
            return self._route.gateway_error(int(http_status[1]), request_id)
        if (refusal := self._route.proxy_error(details, request_id)) is not None:
            return refusal
        if (reason := _CERTIFICATE_ERROR.search(details)) is not None:
            return self._route.untrusted(reason[1].removesuffix(": OK"), request_id)
        if status in _GATEWAY_REFUSALS:
            refused, detail = _GATEWAY_REFUSALS[status]
            return refused(
                f"{detail} ({status.name} from {self._route.address.url}).", hint=_REFUSAL_HINT, request_id=request_id
            )
        kind: type[ConnectionFailed] = ConnectionFailed if _UNSENT.search(details) else AnswerLost
        if status == grpc.StatusCode.DEADLINE_EXCEEDED:
            kind = TimedOut
        return self._route.no_answer(error, status.name, request_id, kind)


def _credentials(route: Route, settings: ConnectionSettings) -> grpc.ChannelCredentials | None:
    if not route.address.is_encrypted or route.roots is None:
        return None
    files = (settings.client_key, settings.client_certificate)
    return grpc.ssl_channel_credentials(
        route.roots.pem.encode("ascii"), *(None if file is None else file.read_bytes() for file in files)
    )


def _untimed(fetch: Callable[[Any, _Attempt], _Result]) -> _Fetch[_Result]:
    """Add the missing timing to a result: only the streams of encode and decode carry it."""
    return lambda stub, attempt: (fetch(stub, attempt), None)

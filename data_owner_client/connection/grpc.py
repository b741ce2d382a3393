"""The calls over gRPC."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from data_owner_client.connection.base import Observer
from data_owner_client.connection.retries import GIVE_UP_AFTER_S, answered
from protocol import pema_pb2, pema_pb2_grpc
from protocol.errors import (
    ConnectionFailed,
    InvalidRequest,
    PayloadTooLarge,
    PemaError,
    ProtocolViolation,
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
from protocol.pieces import join_head, join_rows
from protocol.protobuf import (
    CLIENT_METADATA,
    KEY_METADATA,
    PROBLEM_METADATA,
    REQUEST_ID_METADATA,
    from_proto,
    to_proto,
)
from protocol.timing import ServerTiming

_Result = TypeVar("_Result")
_Answer = TypeVar("_Answer", EncodeResponse, DecodeResponse)
_OPTIONS = [
    # Pieces are of a MiB or so, but one sequence is never divided, and a long one at a large D is larger.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A call may compute for minutes without a byte on the wire, and proxies drop connections that seem idle.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]
_Attempt = dict[str, Any]  # the arguments of one attempt: its time-out and metadata
_Fetch = Callable[[_Attempt], tuple[_Result, ServerTiming | None]]


class GrpcConnection:
    """gRPC connection to a PLM server; thread-safe.

    Args:
        url: where the server listens, `grpc://host:port`, or `grpcs://host:port` for TLS.
        api_key: sent with every call.
        timeout_s: longest wait for an answer, in seconds.
        give_up_after_s: how long a call that fails on the way is made again, in seconds.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        give_up_after_s: float = GIVE_UP_AFTER_S,
    ) -> None:
        scheme, _, target = url.partition("://")
        self.observers: list[Observer] = []
        self._url = url
        self._timeout_s = timeout_s
        self._give_up_after_s = give_up_after_s
        # The server is fair between clients, which may share an address.
        self._metadata: tuple[tuple[str, str], ...] = ((CLIENT_METADATA, uuid.uuid4().hex),)
        if api_key:
            self._metadata += ((KEY_METADATA, f"Bearer {api_key}"),)
        self._target = target
        self._credentials = grpc.ssl_channel_credentials() if scheme == "grpcs" else None
        self._dialling = threading.Lock()
        self._dial()

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def model_card(self) -> ModelCard:
        def fetch(attempt: _Attempt) -> ModelCard:
            return from_proto(self._stub.GetModelCard(pema_pb2.GetModelCardRequest(), **attempt), ModelCard)

        # The first call of every command: a server that is not there should be said at once, not after a minute.
        return self._call("GetModelCard", _untimed(fetch), unless_gone=True)

    def tokenizer(self) -> TokenizerBundle:
        def fetch(attempt: _Attempt) -> TokenizerBundle:
            pieces = self._stub.GetTokenizer(pema_pb2.GetTokenizerRequest(), **attempt)
            return TokenizerBundle.from_json(b"".join(piece.data for piece in pieces))

        return self._call("GetTokenizer", _untimed(fetch))

    def lm_head(self, request: HeadRequest) -> HeadRows:
        proto = to_proto(request, pema_pb2.HeadRequest())

        def fetch(attempt: _Attempt) -> HeadRows:
            return join_head([from_proto(piece, HeadRows) for piece in self._stub.GetLmHead(proto, **attempt)])

        return self._call("GetLmHead", _untimed(fetch))

    def encode(self, request: EncodeRequest) -> EncodeResponse:
        call = pema_pb2.EncodeCall(request=to_proto(request, pema_pb2.EncodeRequest()))
        return self._call("Encode", lambda attempt: _rows(self._stub.Encode, call, EncodeResponse, attempt))

    def decode(self, request: DecodeRequest) -> DecodeResponse:
        call = pema_pb2.DecodeCall(request=to_proto(request, pema_pb2.DecodeRequest()))
        return self._call("Decode", lambda attempt: _rows(self._stub.Decode, call, DecodeResponse, attempt))

    def distribution(self, request: DistributionRequest) -> DistributionResponse:
        proto = to_proto(request, pema_pb2.DistributionRequest())

        def fetch(attempt: _Attempt) -> DistributionResponse:
            return from_proto(self._stub.GetNextTokenDistribution(proto, **attempt), DistributionResponse)

        return self._call("GetNextTokenDistribution", _untimed(fetch))

    def _call(self, name: str, fetch: _Fetch[_Result], *, unless_gone: bool = False) -> _Result:
        def attempt(request_id: str) -> tuple[_Result, ServerTiming | None]:
            return self._attempt(fetch, request_id)

        return answered(
            f"gRPC {name}",
            attempt,
            self.observers,
            give_up_after_s=self._give_up_after_s,
            unless_gone=unless_gone,
        )

    def _dial(self) -> None:
        if self._credentials is None:
            self._channel = grpc.insecure_channel(self._target, _OPTIONS)
        else:
            self._channel = grpc.secure_channel(self._target, self._credentials, _OPTIONS)
        self._stub = pema_pb2_grpc.PlmStub(self._channel)  # type: ignore[no-untyped-call]

    def _redial(self, channel: grpc.Channel) -> None:
        """Leave a channel on which a call timed out: its one connection may be dead, and every retry would use it."""
        with self._dialling:
            if channel is self._channel:
                self._dial()
                channel.close()

    def _attempt(self, fetch: _Fetch[_Result], request_id: str) -> tuple[_Result, ServerTiming | None]:
        channel = self._channel
        try:
            return fetch(
                {
                    "timeout": self._timeout_s,
                    "metadata": ((REQUEST_ID_METADATA, request_id), *self._metadata),
                }
            )
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                self._redial(channel)
            raise self._understood(error, request_id) from error
        except InvalidRequest as error:
            # Of the server's own answer: what the server says of ours comes as a problem, with the request's id.
            if error.request_id is not None:
                raise
            raise ProtocolViolation(
                f"{self._url} did not answer in the form of this protocol.",
                hint="Is this a PEMA server of the same version?",
                request_id=request_id,
            ) from error

    def _understood(self, error: Any, request_id: str) -> PemaError:
        """The error that a call ended with: the server's own if it sent a problem, else what the status means."""
        problem = dict(error.trailing_metadata() or ()).get(PROBLEM_METADATA)
        if problem is not None:
            return from_problem(json.loads(problem), 500)
        status = error.code()
        if status == grpc.StatusCode.RESOURCE_EXHAUSTED:  # gRPC's own refusal: the server's would have a problem
            return PayloadTooLarge(
                "The request is larger than the server takes.", hint="Send fewer sequences in one request."
            )
        if status == grpc.StatusCode.UNIMPLEMENTED:
            return ProtocolViolation(
                f"{self._url} does not know this call ({status.name}).",
                hint="Is this a PEMA server of the same version?",
                request_id=request_id,
            )
        return ConnectionFailed(
            f"No answer from {self._url} ({status.name}).",
            hint="The server is too slow or hangs; ask its owner."
            if status == grpc.StatusCode.DEADLINE_EXCEEDED
            else "Is the address right and the server running? It starts with: pema-server serve",
            request_id=request_id,
        )


def _untimed(fetch: Callable[[_Attempt], _Result]) -> _Fetch[_Result]:
    """Of calls that the model has no part in, the server gives no account."""
    return lambda attempt: (fetch(attempt), None)


def _rows(open_stream: Any, call: Any, answer: type[_Answer], attempt: _Attempt) -> tuple[_Answer, ServerTiming | None]:
    """The answer to one call, on a stream of its own."""
    call.request_id = dict(attempt["metadata"])[REQUEST_ID_METADATA]
    pieces = []
    for piece in open_stream(iter([call]), **attempt):
        if piece.HasField("problem"):
            problem = {field.name: value for field, value in piece.problem.ListFields()}
            raise from_problem(problem, piece.problem.status)
        pieces.append(from_proto(piece.rows, answer))
        if piece.last:
            timing = piece.timing
            return join_rows(pieces), ServerTiming(timing.queue_ms, timing.compute_ms, timing.serialise_ms)
    raise ProtocolViolation(
        "The server ended an answer in its middle.", hint="Nothing was stored; try again.", request_id=call.request_id
    )

"""The calls over gRPC. Like `rest.py`, this module only translates; `service.py` decides."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import grpc
from anyio import CapacityLimiter
from google.protobuf.message import Message as Proto
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from plm_owner_server.accounts import answerable, request_id_of, timing_of
from plm_owner_server.grpc_refusals import RefuseCalls, abort
from plm_owner_server.holder import Admission, ServiceHolder
from plm_owner_server.scheduler import Caller
from plm_owner_server.service import PlmService
from plm_owner_server.tenants import Scope
from plm_owner_server.threads import in_worker
from protocol import pema_pb2, pema_pb2_grpc
from protocol.codec import Message
from protocol.errors import PemaError, TooSlow, to_problem
from protocol.messages import DecodeRequest, DistributionRequest, EncodeRequest, HeadRequest
from protocol.pieces import PIECE_BYTES, split_head, split_rows
from protocol.protobuf import (
    CLIENT_METADATA,
    KEY_METADATA,
    REQUEST_ID_METADATA,
    from_proto,
    to_proto,
)

log = logging.getLogger(__name__)

_SERVICE = pema_pb2.DESCRIPTOR.services_by_name["Plm"].full_name
# Requests of one stream that are worked on at the same time. More are not read: with HTTP/2's own windows that is the
# stream's flow control, in both directions.
_IN_PROGRESS = 4
_READY_POLL_S = 0.2
# Longest wait for calls that are still answered when the server stops, in seconds.
_DRAIN_S = 30.0
_Request = TypeVar("_Request", bound=Message)
_Result = TypeVar("_Result")
_Piece = TypeVar("_Piece", pema_pb2.EncodePiece, pema_pb2.DecodePiece)


@asynccontextmanager
async def serve_grpc(
    holder: ServiceHolder,
    host: str,
    port: int,
    *,
    max_body_bytes: int,
    max_calls: int,
    max_connections: int = 1000,
    transfer_s: float = 30.0,
    credentials: grpc.ServerCredentials | None = None,
) -> AsyncIterator[int]:
    """Serve the calls, health and reflection; gives the port.

    Args:
        holder: gives the service; its calls are UNAVAILABLE until the model is loaded and warm.
        host: name or address to listen on.
        port: 0 takes a free one.
        max_body_bytes: larger requests are refused.
        max_calls: calls worked on at the same time, those that wait for the model included.
        max_connections: more are closed at once.
        transfer_s: longest time that a client may take to shake hands, and to read each piece of an answer.
        credentials: for TLS.

    Raises:
        OSError: the address cannot be had.
    """
    server = grpc.aio.server(
        interceptors=[RefuseCalls()],
        options=[
            ("grpc.max_receive_message_length", max_body_bytes),
            # Compressed messages are refused: the limit is not applied to what they become.
            ("grpc.compression_enabled_algorithms_bitset", 1 << grpc.Compression.NoCompression),
            ("grpc.max_allowed_incoming_connections", max_connections),
            ("grpc.max_concurrent_streams", max_calls),
            ("grpc.server_handshake_timeout_ms", int(1000 * transfer_s)),
            # Connections of those who are gone, or have nothing to say, are closed.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.max_connection_idle_ms", 600_000),
            ("grpc.so_reuseport", 0),  # a second server on the same port is a mistake, not a replica
            # Clients ping while they wait for a long computation: proxies drop connections that seem idle, often after
            # a minute. Without this the server would take pings every 30 s for an attack.
            ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
        ],
    )
    limiter = CapacityLimiter(max_calls)
    pema_pb2_grpc.add_PlmServicer_to_server(_Servicer(holder, limiter, transfer_s), server)  # type: ignore[no-untyped-call]
    state = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    reflection.enable_server_reflection((_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if credentials is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise OSError(f"gRPC cannot listen on port {port} of {host}; is it in use?") from error
    await server.start()
    announcing = asyncio.create_task(_announce_readiness(holder, state))
    try:
        yield bound
    finally:
        announcing.cancel()
        await state.enter_graceful_shutdown()
        await server.stop(_DRAIN_S)


async def _announce_readiness(holder: ServiceHolder, state: health.aio.HealthServicer) -> None:
    status = health_pb2.HealthCheckResponse
    for name in ("", _SERVICE):
        await state.set(name, status.NOT_SERVING)
    while holder.service is None:
        await asyncio.sleep(_READY_POLL_S)
    for name in ("", _SERVICE):
        await state.set(name, status.SERVING)


@dataclass(frozen=True)
class _Shown:
    """What a caller shows of who it is: a key, and the common name in its certificate."""

    key: str | None
    certificate: str | None


class _Servicer(pema_pb2_grpc.PlmServicer):
    def __init__(self, holder: ServiceHolder, limiter: CapacityLimiter, transfer_s: float) -> None:
        self._holder = holder
        self._limiter = limiter
        self._transfer_s = transfer_s

    async def GetModelCard(self, request: Proto, context: Any) -> Proto:
        return await self._answer(
            "GetModelCard", "card", context, lambda a: to_proto(a.service.model_card(), pema_pb2.ModelCard())
        )

    async def GetTokenizer(self, request: Proto, context: Any) -> None:
        data = await self._answer("GetTokenizer", "card", context, lambda a: a.service.tokenizer().to_json())
        for start in range(0, len(data), PIECE_BYTES):
            await self._write(context, pema_pb2.TokenizerPiece(data=data[start : start + PIECE_BYTES]))

    async def GetLmHead(self, request: Proto, context: Any) -> None:
        rows = await self._answer(
            "GetLmHead", "head", context, lambda a: a.service.lm_head(from_proto(request, HeadRequest))
        )
        for piece in split_head(rows):
            await self._write(context, to_proto(piece, pema_pb2.HeadRows()))

    async def Encode(self, calls: AsyncIterator[Any], context: Any) -> None:
        await self._answer_stream(
            "Encode", "encode", calls, context, EncodeRequest, PlmService.encode, pema_pb2.EncodePiece
        )

    async def Decode(self, calls: AsyncIterator[Any], context: Any) -> None:
        await self._answer_stream(
            "Decode", "decode", calls, context, DecodeRequest, PlmService.decode, pema_pb2.DecodePiece
        )

    async def GetNextTokenDistribution(self, request: Proto, context: Any) -> Proto:
        client, departed = _client(context)

        def work(admitted: Admission) -> Proto:
            caller = replace(admitted.caller(client), departed=departed)
            answer = admitted.service.distribution(from_proto(request, DistributionRequest), caller)
            return to_proto(answer, pema_pb2.DistributionResponse())

        return await self._answer("GetNextTokenDistribution", "distribution", context, work)

    async def _answer(self, name: str, scope: Scope, context: Any, work: Callable[[Admission], _Result]) -> _Result:
        """The result of `work`, or the call's end with a status and its problem document."""
        metadata_given = _metadata(context)
        request_id = request_id_of(metadata_given.get(REQUEST_ID_METADATA, ""))
        try:
            return await self._work(name, scope, request_id, _shown(context), work)
        except PemaError as error:
            await abort(context, error)
            raise  # not reached: abort raises

    async def _answer_stream(
        self,
        name: str,
        scope: Scope,
        calls: AsyncIterator[Any],
        context: Any,
        request_type: type[_Request],
        call: Callable[[PlmService, _Request, Caller], Any],
        piece_type: type[_Piece],
    ) -> None:
        """Answer every call of a stream as it is ready, several at a time."""
        places, writing = asyncio.Semaphore(_IN_PROGRESS), asyncio.Lock()
        client, departed = _client(context)
        shown = _shown(context)

        async def answer(given: Any) -> None:
            try:
                request_id = request_id_of(given.request_id)
                try:
                    pieces = await self._work(name, scope, request_id, shown, lambda a: pieces_of(a, given.request))
                except PemaError as error:
                    pieces = [piece_type(problem=pema_pb2.Problem(**to_problem(error)), last=True)]
                # Not given back if it fails: a write that was given up is still on its way, and no other may begin.
                await writing.acquire()
                for piece in pieces:
                    piece.request_id = given.request_id
                    await self._write(context, piece)
                writing.release()
            finally:
                places.release()

        def pieces_of(admitted: Admission, request: Proto) -> list[_Piece]:
            started, caller = time.perf_counter(), replace(admitted.caller(client), departed=departed)
            pieces = []
            for part in split_rows(call(admitted.service, from_proto(request, request_type), caller)):
                pieces.append(piece_type())
                to_proto(part, pieces[-1].rows)
            pieces[-1].last = True
            pieces[-1].timing.CopyFrom(pema_pb2.Timing(**asdict(timing_of(caller, started))))
            return pieces

        async with asyncio.TaskGroup() as tasks:
            async for given in calls:
                await places.acquire()
                tasks.create_task(answer(given))

    async def _write(self, context: Any, piece: Proto) -> None:
        """Write a piece of an answer once there is room for it.

        Raises:
            TooSlow: the client does not read; `RefuseCalls` ends the call.
        """
        try:
            async with asyncio.timeout(self._transfer_s):
                await context.write(piece)
        except TimeoutError:
            raise TooSlow(
                f"A piece of the answer was not read within {self._transfer_s:g} s.", hint="Read answers as they come."
            ) from None

    async def _work(
        self, name: str, scope: Scope, request_id: str, shown: _Shown, work: Callable[[Admission], _Result]
    ) -> _Result:
        """The result of `work` in a thread, and a line in the log.

        Raises:
            PemaError: what the client shall see.
        """
        started = time.perf_counter()
        outcome = "OK"
        try:
            admitted = await self._holder.admit(shown.key, scope, shown.certificate)
            return await in_worker(lambda: work(admitted), self._limiter)
        except Exception as error:
            told = answerable(error, request_id, name)
            outcome = told.grpc_status
            raise told from error
        finally:
            log.info("%s gRPC %s -> %s in %.0f ms", request_id, name, outcome, 1000 * (time.perf_counter() - started))


def _metadata(context: Any) -> dict[str, str]:
    return dict(context.invocation_metadata() or ())


def _shown(context: Any) -> _Shown:
    names = context.auth_context().get("x509_common_name", [])
    return _Shown(_metadata(context).get(KEY_METADATA), names[0].decode() if len(names) == 1 else None)


def _client(context: Any) -> tuple[str, threading.Event]:
    """What the client calls itself, and a note of when it hangs up."""
    departed = threading.Event()
    context.add_done_callback(lambda _: departed.set())
    return _metadata(context).get(CLIENT_METADATA) or context.peer(), departed

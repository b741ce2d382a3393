"""The calls over gRPC. This module only translates; the service applies the rules."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any, TypeVar

import grpc
from anyio import CapacityLimiter
from google.protobuf.message import Message as Proto
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from plm_owner_server.admission.controller import AdmissionController
from plm_owner_server.operations.call_log import CLIENT_DISCONNECTED, CallRecord, request_id_of, timing_of
from plm_owner_server.operations.serving_state import ServingState
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.service.requests import CallContext
from plm_owner_server.service.worker_threads import run_in_worker
from plm_owner_server.transports import calls
from plm_owner_server.transports.calls import Call, RequestCall
from plm_owner_server.transports.grpc_errors import MalformedRequestInterceptor, abort, write
from protocol import pema_pb2, pema_pb2_grpc
from protocol.addresses import authority
from protocol.chunks import CHUNK_BYTES, split_head, split_rows
from protocol.errors import PemaError, to_problem
from protocol.messages import DistributionRequest, HeadRequest, HeadRows
from protocol.protobuf import (
    CLIENT_METADATA,
    KEY_METADATA,
    RATE_LIMIT_METADATA,
    RATE_LIMIT_POLICY_METADATA,
    REQUEST_ID_METADATA,
    from_proto,
    to_proto,
)
from protocol.rate_limits import RATE_LIMIT, RATE_LIMIT_POLICY, to_fields

_SERVICE = pema_pb2.DESCRIPTOR.services_by_name["Plm"].full_name
# Requests of one stream that are worked on at the same time. Further requests are not read, so that HTTP/2's windows
# control the flow of the stream in both directions.
_IN_PROGRESS = 4
_READY_POLL_SECONDS = 0.1
# Time for answers in transit when the server stops. Idle streams do not end by themselves.
_FLUSH_SECONDS = 1.0
# W3C's name of the trace context; equal over HTTP.
_TRACE_METADATA = "traceparent"
_Result = TypeVar("_Result")
_Piece = TypeVar("_Piece", pema_pb2.EncodePiece, pema_pb2.DecodePiece)


@asynccontextmanager
async def serve_grpc(
    controller: AdmissionController,
    host: str,
    port: int,
    *,
    max_body_bytes: int,
    max_calls: int,
    max_connections: int = 1000,
    transfer_s: float = 30.0,
    connection_age_s: float = 60.0,
    credentials: grpc.ServerCredentials | None = None,
) -> AsyncIterator[int]:
    """Serve the calls, health and reflection while the body runs; yields the port.

    Args:
        controller: admits calls. They are UNAVAILABLE until the model is loaded and warm.
        host: name or address to listen on.
        port: port to listen on; 0 takes a free one.
        max_body_bytes: size of the largest request.
        max_calls: largest number of calls in progress, including calls that wait for the model.
        max_connections: largest number of connections; further ones are closed at once.
        transfer_s: longest time for a client's handshake, and for reading each piece of an answer, in seconds.
        connection_age_s: age in seconds at which clients are told to open another connection. Calls in progress end on
            the old one.
        credentials: credentials for TLS; None for plain connections.

    Raises:
        OSError: the server cannot listen there.
    """
    server = grpc.aio.server(
        interceptors=[MalformedRequestInterceptor()],
        options=[
            ("grpc.max_receive_message_length", max_body_bytes),
            # Compressed messages are refused: the limit is not applied to what they become.
            ("grpc.compression_enabled_algorithms_bitset", 1 << grpc.Compression.NoCompression),
            ("grpc.max_allowed_incoming_connections", max_connections),
            ("grpc.max_concurrent_streams", max_calls),
            ("grpc.server_handshake_timeout_ms", int(1000 * transfer_s)),
            # Dead and idle connections are closed.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.max_connection_idle_ms", 600_000),
            # A load balancer of connections then spreads clients over new servers, and away from one that stops.
            ("grpc.max_connection_age_ms", int(1000 * connection_age_s)),
            ("grpc.so_reuseport", 0),  # a second server on the same port is a mistake, not a replica
            # Clients ping while they wait for a long computation, because proxies drop idle connections, often after a
            # minute. Without this option the server would treat pings every 30 s as an attack.
            ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
        ],
    )
    limiter = CapacityLimiter(max_calls)
    pema_pb2_grpc.add_PlmServicer_to_server(_Servicer(controller, limiter, transfer_s), server)  # type: ignore[no-untyped-call]
    state = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    reflection.enable_server_reflection((_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        address = authority(host, port)
        if credentials is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise OSError(f"gRPC cannot listen on port {port} of {host}; is it in use?") from error
    await server.start()
    announcing = asyncio.create_task(_announce_readiness(controller.state, state))
    try:
        yield bound
    finally:
        announcing.cancel()
        await state.enter_graceful_shutdown()
        await server.stop(_FLUSH_SECONDS)


async def _announce_readiness(state: ServingState, servicer: health.aio.HealthServicer) -> None:
    status, announced = health_pb2.HealthCheckResponse, None
    while True:
        if (ready := state.is_ready) != announced:
            announced = ready
            for name in ("", _SERVICE):
                await servicer.set(name, status.SERVING if ready else status.NOT_SERVING)
        await asyncio.sleep(_READY_POLL_SECONDS)


class _Servicer(pema_pb2_grpc.PlmServicer):
    def __init__(self, controller: AdmissionController, limiter: CapacityLimiter, transfer_s: float) -> None:
        self._controller = controller
        self._limiter = limiter
        self._transfer_s = transfer_s

    async def GetModelCard(self, request: Proto, rpc: Any) -> Proto:
        def work(service: PlmService, context: CallContext) -> Proto:
            return to_proto(service.model_card(context), pema_pb2.ModelCard())

        with self._controller.state.at_work():
            return await self._answer(calls.CARD, rpc, work)

    async def GetTokenizer(self, request: Proto, rpc: Any) -> None:
        def work(service: PlmService, context: CallContext) -> bytes:
            return service.tokenizer(context).to_json()

        with self._controller.state.at_work():
            data = await self._answer(calls.TOKENIZER, rpc, work)
            for start in range(0, len(data), CHUNK_BYTES):
                await write(rpc, pema_pb2.TokenizerPiece(data=data[start : start + CHUNK_BYTES]), self._transfer_s)

    async def GetLmHead(self, request: Proto, rpc: Any) -> None:
        def work(service: PlmService, context: CallContext) -> HeadRows:
            return service.lm_head(from_proto(request, HeadRequest), context)

        with self._controller.state.at_work():
            rows = await self._answer(calls.HEAD, rpc, work)
            for piece in split_head(rows):
                await write(rpc, to_proto(piece, pema_pb2.HeadRows()), self._transfer_s)

    async def Encode(self, requests: AsyncIterator[Any], rpc: Any) -> None:
        await self._answer_stream(calls.ENCODE, requests, rpc, pema_pb2.EncodePiece)

    async def Decode(self, requests: AsyncIterator[Any], rpc: Any) -> None:
        await self._answer_stream(calls.DECODE, requests, rpc, pema_pb2.DecodePiece)

    async def GetNextTokenDistribution(self, request: Proto, rpc: Any) -> Proto:
        def work(service: PlmService, context: CallContext) -> Proto:
            answer = service.distribution(from_proto(request, DistributionRequest), context)
            return to_proto(answer, pema_pb2.DistributionResponse())

        with self._controller.state.at_work():
            return await self._answer(calls.DISTRIBUTION, rpc, work)

    async def _answer(self, call: Call, rpc: Any, work: Callable[[PlmService, CallContext], _Result]) -> _Result:
        """The result of `work`. An error ends the call with a status and its problem document."""
        request_id = _metadata(rpc).get(REQUEST_ID_METADATA, "")
        try:
            return await self._run(call, request_id, rpc, _disconnect_event(rpc), work)
        except PemaError as error:
            await abort(rpc, error)
            raise  # not reached: abort raises

    async def _answer_stream(
        self, call: RequestCall, requests: AsyncIterator[Any], rpc: Any, piece_type: type[_Piece]
    ) -> None:
        """Answer every request of a stream as soon as it is ready, several at a time."""
        slots, writing = asyncio.Semaphore(_IN_PROGRESS), asyncio.Lock()
        disconnected = _disconnect_event(rpc)

        async def answer(envelope: Any) -> None:
            try:
                with self._controller.state.at_work():
                    await write_answer(envelope)
            finally:
                slots.release()

        async def write_answer(envelope: Any) -> None:
            try:
                pieces = await self._run(
                    call,
                    envelope.request_id,
                    rpc,
                    disconnected,
                    lambda service, context: _pieces(call, service, context, envelope.request, piece_type),
                )
            except PemaError as error:
                pieces = [piece_type(problem=pema_pb2.Problem(**to_problem(error)), last=True)]
            # Not released after a failure: an abandoned write is still in progress, and no other may begin.
            await writing.acquire()
            for piece in pieces:
                piece.request_id = envelope.request_id
                await write(rpc, piece, self._transfer_s)
            writing.release()

        async with asyncio.TaskGroup() as tasks:
            async for envelope in requests:
                await slots.acquire()
                tasks.create_task(answer(envelope))

    async def _run(
        self,
        call: Call,
        request_id: str,
        rpc: Any,
        disconnected: threading.Event,
        work: Callable[[PlmService, CallContext], _Result],
    ) -> _Result:
        """The result of `work` in a worker thread. The call is recorded; trailing metadata hold the remaining quotas.

        Raises:
            PemaError: the error for the client.
        """
        metadata = _metadata(rpc)
        traceparent = metadata.get(_TRACE_METADATA, "")
        record = CallRecord(call.name, "grpc", f"gRPC {call.rpc}", request_id_of(request_id), traceparent)
        client = metadata.get(CLIENT_METADATA) or rpc.peer()
        context = CallContext(client, disconnected=disconnected, usage=record.usage)
        with self._controller.state.recorder.record(record):
            try:
                key = metadata.get(KEY_METADATA)
                service = await self._controller.admit(context, call.scope, key, _common_name(rpc))
                return await run_in_worker(lambda: work(service, context), self._limiter)
            except asyncio.CancelledError:
                record.outcome, record.status = CLIENT_DISCONNECTED, "CANCELLED"
                raise
            except Exception as caught:
                error = record.fail(caught)
                record.status = error.grpc_status
                raise error from caught
            finally:
                if fields := to_fields(context.meter.left):  # in a stream, the newest call's
                    rpc.set_trailing_metadata(
                        (
                            (RATE_LIMIT_METADATA, fields[RATE_LIMIT]),
                            (RATE_LIMIT_POLICY_METADATA, fields[RATE_LIMIT_POLICY]),
                        )
                    )


def _pieces(
    call: RequestCall, service: PlmService, context: CallContext, request: Proto, piece_type: type[_Piece]
) -> list[_Piece]:
    """The answer to a request of a stream, in pieces. The last one holds remaining quotas and timing."""
    started = time.perf_counter()
    answer: Any = call.answer(service, from_proto(request, call.request), context)
    pieces = []
    for rows in split_rows(answer):
        pieces.append(piece_type())
        to_proto(rows, pieces[-1].rows)
    pieces[-1].last = True
    if fields := to_fields(context.meter.left):
        pieces[-1].quotas.rate_limit = fields[RATE_LIMIT]
        pieces[-1].quotas.rate_limit_policy = fields[RATE_LIMIT_POLICY]
    pieces[-1].timing.CopyFrom(pema_pb2.Timing(**asdict(timing_of(context.usage, started))))
    return pieces


def _metadata(rpc: Any) -> dict[str, str]:
    return dict(rpc.invocation_metadata() or ())


def _common_name(rpc: Any) -> str | None:
    """The common name in the client's certificate; None without a certificate."""
    names = rpc.auth_context().get("x509_common_name", [])
    return names[0].decode() if len(names) == 1 else None


def _disconnect_event(rpc: Any) -> threading.Event:
    """An event that is set when the RPC ends, also by the client."""
    disconnected = threading.Event()
    rpc.add_done_callback(lambda _: disconnected.set())
    return disconnected

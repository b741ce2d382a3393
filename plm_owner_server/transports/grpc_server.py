"""The calls over gRPC. Like `rest.py`, this module only translates; `service.py` decides."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from typing import Any, TypeVar

import grpc
from anyio import CapacityLimiter
from google.protobuf.message import Message as Proto
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from plm_owner_server.admission.controller import Admission, AdmissionController
from plm_owner_server.operations.call_log import CLIENT_DISCONNECTED, CallRecord, request_id_of, timing_of
from plm_owner_server.operations.serving_state import ServingState
from plm_owner_server.service.metering import UNMETERED
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.service.requests import CallContext
from plm_owner_server.service.worker_threads import run_in_worker
from plm_owner_server.tenants.store import Scope
from plm_owner_server.transports.grpc_errors import MalformedRequestInterceptor, abort, write
from protocol import pema_pb2, pema_pb2_grpc
from protocol.chunks import PIECE_BYTES, split_head, split_rows
from protocol.codec import Message
from protocol.errors import PemaError, to_problem
from protocol.messages import DecodeRequest, DistributionRequest, EncodeRequest, HeadRequest, HeadRows
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
_CALLS = {
    "GetModelCard": "card",
    "GetTokenizer": "tokenizer",
    "GetLmHead": "head",
    "Encode": "encode",
    "Decode": "decode",
    "GetNextTokenDistribution": "distribution",
}
# Requests of one stream that are worked on at the same time. More are not read: with HTTP/2's own windows that is the
# stream's flow control, in both directions.
_IN_PROGRESS = 4
_READY_POLL_S = 0.1
# For what is on its way when the server stops, in seconds. Streams on which nothing is asked do not end by themselves.
_LAST_WORDS_S = 1.0
# W3C's name for it; the same over HTTP.
_TRACE_METADATA = "traceparent"
_Request = TypeVar("_Request", bound=Message)
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
    credentials: grpc.ServerCredentials | None = None,
) -> AsyncIterator[int]:
    """Serve the calls, health and reflection; gives the port.

    Args:
        controller: gives the service; its calls are UNAVAILABLE until the model is loaded and warm.
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
        interceptors=[MalformedRequestInterceptor()],
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
    pema_pb2_grpc.add_PlmServicer_to_server(_Servicer(controller, limiter, transfer_s), server)  # type: ignore[no-untyped-call]
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
    announcing = asyncio.create_task(_announce_readiness(controller.state, state))
    try:
        yield bound
    finally:
        announcing.cancel()
        await state.enter_graceful_shutdown()
        await server.stop(_LAST_WORDS_S)


async def _announce_readiness(state: ServingState, servicer: health.aio.HealthServicer) -> None:
    status, told = health_pb2.HealthCheckResponse, None
    while True:
        if (ready := state.is_ready) != told:
            told = ready
            for name in ("", _SERVICE):
                await servicer.set(name, status.SERVING if ready else status.NOT_SERVING)
        await asyncio.sleep(_READY_POLL_S)


class _Servicer(pema_pb2_grpc.PlmServicer):
    def __init__(self, controller: AdmissionController, limiter: CapacityLimiter, transfer_s: float) -> None:
        self._controller = controller
        self._limiter = limiter
        self._transfer_s = transfer_s

    async def GetModelCard(self, request: Proto, context: Any) -> Proto:
        caller = _callers(context)

        def work(admitted: Admission, call: CallRecord) -> Proto:
            return to_proto(admitted.service.model_card(caller(admitted, call)), pema_pb2.ModelCard())

        with self._controller.state.at_work():
            return await self._answer("GetModelCard", "card", context, work)

    async def GetTokenizer(self, request: Proto, context: Any) -> None:
        caller = _callers(context)

        def work(admitted: Admission, call: CallRecord) -> bytes:
            return admitted.service.tokenizer(caller(admitted, call)).to_json()

        with self._controller.state.at_work():
            data = await self._answer("GetTokenizer", "card", context, work)
            for start in range(0, len(data), PIECE_BYTES):
                await write(context, pema_pb2.TokenizerPiece(data=data[start : start + PIECE_BYTES]), self._transfer_s)

    async def GetLmHead(self, request: Proto, context: Any) -> None:
        caller = _callers(context)

        def work(admitted: Admission, call: CallRecord) -> HeadRows:
            return admitted.service.lm_head(from_proto(request, HeadRequest), caller(admitted, call))

        with self._controller.state.at_work():
            rows = await self._answer("GetLmHead", "head", context, work)
            for piece in split_head(rows):
                await write(context, to_proto(piece, pema_pb2.HeadRows()), self._transfer_s)

    async def Encode(self, calls: AsyncIterator[Any], context: Any) -> None:
        await self._answer_stream(
            "Encode", "encode", calls, context, EncodeRequest, PlmService.encode, pema_pb2.EncodePiece
        )

    async def Decode(self, calls: AsyncIterator[Any], context: Any) -> None:
        await self._answer_stream(
            "Decode", "decode", calls, context, DecodeRequest, PlmService.decode, pema_pb2.DecodePiece
        )

    async def GetNextTokenDistribution(self, request: Proto, context: Any) -> Proto:
        caller = _callers(context)

        def work(admitted: Admission, call: CallRecord) -> Proto:
            answer = admitted.service.distribution(from_proto(request, DistributionRequest), caller(admitted, call))
            return to_proto(answer, pema_pb2.DistributionResponse())

        with self._controller.state.at_work():
            return await self._answer("GetNextTokenDistribution", "distribution", context, work)

    async def _answer(
        self, name: str, scope: Scope, context: Any, work: Callable[[Admission, CallRecord], _Result]
    ) -> _Result:
        """The result of `work`, or the call's end with a status and its problem document."""
        request_id = _metadata(context).get(REQUEST_ID_METADATA, "")
        try:
            return await self._work(name, scope, request_id, context, work)
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
        call: Callable[[PlmService, _Request, CallContext], Any],
        piece_type: type[_Piece],
    ) -> None:
        """Answer every call of a stream as it is ready, several at a time."""
        places, writing = asyncio.Semaphore(_IN_PROGRESS), asyncio.Lock()
        caller_of = _callers(context)

        async def answer(given: Any) -> None:
            try:
                with self._controller.state.at_work():
                    await answered(given)
            finally:
                places.release()

        async def answered(given: Any) -> None:
            try:
                pieces = await self._work(
                    name, scope, given.request_id, context, lambda a, c: pieces_of(a, c, given.request)
                )
            except PemaError as error:
                pieces = [piece_type(problem=pema_pb2.Problem(**to_problem(error)), last=True)]
            # Not given back if it fails: a write that was given up is still on its way, and no other may begin.
            await writing.acquire()
            for piece in pieces:
                piece.request_id = given.request_id
                await write(context, piece, self._transfer_s)
            writing.release()

        def pieces_of(admitted: Admission, accounted: CallRecord, request: Proto) -> list[_Piece]:
            started, caller = time.perf_counter(), caller_of(admitted, accounted)
            pieces = []
            for part in split_rows(call(admitted.service, from_proto(request, request_type), caller)):
                pieces.append(piece_type())
                to_proto(part, pieces[-1].rows)
            pieces[-1].last = True
            if fields := to_fields(caller.meter.left):
                pieces[-1].quotas.rate_limit = fields[RATE_LIMIT]
                pieces[-1].quotas.rate_limit_policy = fields[RATE_LIMIT_POLICY]
            pieces[-1].timing.CopyFrom(pema_pb2.Timing(**asdict(timing_of(caller.spent, started))))
            return pieces

        async with asyncio.TaskGroup() as tasks:
            async for given in calls:
                await places.acquire()
                tasks.create_task(answer(given))

    async def _work(
        self, name: str, scope: Scope, request_id: str, context: Any, work: Callable[[Admission, CallRecord], _Result]
    ) -> _Result:
        """The result of `work` in a thread, put down to the accounts; what is left of quotas in trailing metadata.

        Raises:
            PemaError: what the client shall see.
        """
        metadata, meter = _metadata(context), UNMETERED
        traceparent = metadata.get(_TRACE_METADATA, "")
        call = CallRecord(_CALLS[name], "grpc", f"gRPC {name}", request_id_of(request_id), traceparent)
        with self._controller.state.recorder.of(call):
            try:
                admitted = await self._controller.admit(metadata.get(KEY_METADATA), scope, _certificate(context))
                meter = admitted.meter
                return await run_in_worker(lambda: work(admitted, call), self._limiter)
            except asyncio.CancelledError:
                call.outcome, call.status = CLIENT_DISCONNECTED, "CANCELLED"
                raise
            except Exception as error:
                told = call.fail(error)
                call.status = told.grpc_status
                raise told from error
            finally:
                if fields := to_fields(meter.left):  # of several calls of a stream, the newest
                    context.set_trailing_metadata(
                        (
                            (RATE_LIMIT_METADATA, fields[RATE_LIMIT]),
                            (RATE_LIMIT_POLICY_METADATA, fields[RATE_LIMIT_POLICY]),
                        )
                    )


def _metadata(context: Any) -> dict[str, str]:
    return dict(context.invocation_metadata() or ())


def _certificate(context: Any) -> str | None:
    """The common name in the caller's certificate, if it shows one."""
    names = context.auth_context().get("x509_common_name", [])
    return names[0].decode() if len(names) == 1 else None


def _callers(context: Any) -> Callable[[Admission, CallRecord], CallContext]:
    """Makes callers of what the client calls itself, with a note of when it hangs up."""
    departed = threading.Event()
    context.add_done_callback(lambda _: departed.set())
    client = _metadata(context).get(CLIENT_METADATA) or context.peer()
    return lambda admitted, call: replace(admitted.caller(client), departed=departed, spent=call.spent)

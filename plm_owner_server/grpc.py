"""The calls over gRPC. Like `rest.py`, this module only translates; `service.py` decides."""

from __future__ import annotations

import asyncio
import json
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

from plm_owner_server.accounts import DEPARTED, Call, request_id_of, timing_of
from plm_owner_server.holder import Admission, ServiceHolder
from plm_owner_server.service import PlmService
from plm_owner_server.tenants import Scope
from plm_owner_server.threads import in_worker
from plm_owner_server.tickets import Caller
from protocol import pema_pb2, pema_pb2_grpc
from protocol.codec import Message
from protocol.errors import PemaError, to_problem
from protocol.messages import DecodeRequest, DistributionRequest, EncodeRequest, HeadRequest, HeadRows
from protocol.pieces import PIECE_BYTES, split_head, split_rows
from protocol.protobuf import (
    CLIENT_METADATA,
    KEY_METADATA,
    PROBLEM_METADATA,
    REQUEST_ID_METADATA,
    from_proto,
    to_proto,
)

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
    holder: ServiceHolder,
    host: str,
    port: int,
    *,
    max_body_bytes: int,
    max_calls: int,
    credentials: grpc.ServerCredentials | None = None,
) -> AsyncIterator[int]:
    """Serve the calls, health and reflection; gives the port.

    Args:
        holder: gives the service; its calls are UNAVAILABLE until the model is loaded and warm.
        host: name or address to listen on.
        port: 0 takes a free one.
        max_body_bytes: larger requests are refused.
        max_calls: calls worked on at the same time, those that wait for the model included.
        credentials: for TLS.

    Raises:
        OSError: the address cannot be had.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", max_body_bytes),
            ("grpc.so_reuseport", 0),  # a second server on the same port is a mistake, not a replica
            # Clients ping while they wait for a long computation: proxies drop connections that seem idle, often after
            # a minute. Without this the server would take pings every 30 s for an attack.
            ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
        ]
    )
    limiter = CapacityLimiter(max_calls)
    pema_pb2_grpc.add_PlmServicer_to_server(_Servicer(holder, limiter), server)  # type: ignore[no-untyped-call]
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
        await server.stop(_LAST_WORDS_S)


async def _announce_readiness(holder: ServiceHolder, state: health.aio.HealthServicer) -> None:
    status, told = health_pb2.HealthCheckResponse, None
    while True:
        if (ready := holder.is_ready) != told:
            told = ready
            for name in ("", _SERVICE):
                await state.set(name, status.SERVING if ready else status.NOT_SERVING)
        await asyncio.sleep(_READY_POLL_S)


class _Servicer(pema_pb2_grpc.PlmServicer):
    def __init__(self, holder: ServiceHolder, limiter: CapacityLimiter) -> None:
        self._holder = holder
        self._limiter = limiter

    async def GetModelCard(self, request: Proto, context: Any) -> Proto:
        return await self._answer(
            "GetModelCard", "card", context, lambda a, _: to_proto(a.service.model_card(), pema_pb2.ModelCard())
        )

    async def GetTokenizer(self, request: Proto, context: Any) -> AsyncIterator[Proto]:
        with self._holder.at_work():
            data = await self._answer("GetTokenizer", "card", context, lambda a, _: a.service.tokenizer().to_json())
            for start in range(0, len(data), PIECE_BYTES):
                yield pema_pb2.TokenizerPiece(data=data[start : start + PIECE_BYTES])

    async def GetLmHead(self, request: Proto, context: Any) -> AsyncIterator[Proto]:
        client, departed = _client(context)

        def work(admitted: Admission, call: Call) -> HeadRows:
            caller = _caller(admitted, call, client, departed)
            return admitted.service.lm_head(from_proto(request, HeadRequest), caller)

        with self._holder.at_work():
            rows = await self._answer("GetLmHead", "head", context, work)
            for piece in split_head(rows):
                yield to_proto(piece, pema_pb2.HeadRows())

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

        def work(admitted: Admission, call: Call) -> Proto:
            caller = _caller(admitted, call, client, departed)
            answer = admitted.service.distribution(from_proto(request, DistributionRequest), caller)
            return to_proto(answer, pema_pb2.DistributionResponse())

        return await self._answer("GetNextTokenDistribution", "distribution", context, work)

    async def _answer(
        self, name: str, scope: Scope, context: Any, work: Callable[[Admission, Call], _Result]
    ) -> _Result:
        """The result of `work`, or the call's end with a status and its problem document."""
        given = _metadata(context)
        try:
            with self._holder.at_work():
                return await self._work(name, scope, given, given.get(REQUEST_ID_METADATA, ""), work)
        except PemaError as error:
            metadata = ((PROBLEM_METADATA, json.dumps(to_problem(error)).encode()),)
            await context.abort(grpc.StatusCode[error.grpc_status], error.detail, metadata)
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
        metadata = _metadata(context)

        async def answer(given: Any) -> None:
            try:
                with self._holder.at_work():
                    await answered(given)
            finally:
                places.release()

        async def answered(given: Any) -> None:
            try:
                pieces = await self._work(
                    name, scope, metadata, given.request_id, lambda a, c: pieces_of(a, c, given.request)
                )
            except PemaError as error:
                pieces = [piece_type(problem=pema_pb2.Problem(**to_problem(error)), last=True)]
            async with writing:
                for piece in pieces:
                    piece.request_id = given.request_id
                    await context.write(piece)

        def pieces_of(admitted: Admission, accounted: Call, request: Proto) -> list[_Piece]:
            started, caller = time.perf_counter(), _caller(admitted, accounted, client, departed)
            pieces = []
            for part in split_rows(call(admitted.service, from_proto(request, request_type), caller)):
                pieces.append(piece_type())
                to_proto(part, pieces[-1].rows)
            pieces[-1].last = True
            pieces[-1].timing.CopyFrom(pema_pb2.Timing(**asdict(timing_of(caller.spent, started))))
            return pieces

        async with asyncio.TaskGroup() as tasks:
            async for given in calls:
                await places.acquire()
                tasks.create_task(answer(given))

    async def _work(
        self,
        name: str,
        scope: Scope,
        metadata: dict[str, str],
        request_id: str,
        work: Callable[[Admission, Call], _Result],
    ) -> _Result:
        """The result of `work` in a thread, put down to the accounts.

        Raises:
            PemaError: what the client shall see.
        """
        traceparent = metadata.get(_TRACE_METADATA, "")
        call = Call(_CALLS[name], "grpc", f"gRPC {name}", request_id_of(request_id), traceparent)
        with self._holder.accounts.of(call):
            try:
                admitted = await self._holder.admit(metadata.get(KEY_METADATA), scope)
                return await in_worker(lambda: work(admitted, call), self._limiter)
            except asyncio.CancelledError:
                call.outcome, call.status = DEPARTED, "CANCELLED"
                raise
            except Exception as error:
                told = call.fail(error)
                call.status = told.grpc_status
                raise told from error


def _caller(admitted: Admission, call: Call, client: str, departed: threading.Event) -> Caller:
    return replace(admitted.caller(client), departed=departed, spent=call.spent)


def _metadata(context: Any) -> dict[str, str]:
    return dict(context.invocation_metadata() or ())


def _client(context: Any) -> tuple[str, threading.Event]:
    """What the client calls itself, and a note of when it hangs up."""
    departed = threading.Event()
    context.add_done_callback(lambda _: departed.set())
    return _metadata(context).get(CLIENT_METADATA) or context.peer(), departed

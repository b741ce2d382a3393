"""Errors of gRPC calls, also of malformed requests, which gRPC itself treats as a fault of the server."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from protocol.errors import MalformedMessage, PemaError, RequestTimeout, to_problem
from protocol.protobuf import PROBLEM_METADATA

_HANDLERS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


async def abort(rpc: Any, error: PemaError) -> None:
    """End a call with an error and its problem document. Raises the exception with which gRPC ends a handler."""
    problem = (PROBLEM_METADATA, json.dumps(to_problem(error)).encode())
    metadata = (*(rpc.trailing_metadata() or ()), problem)
    await rpc.abort(grpc.StatusCode[error.grpc_status], error.detail, metadata)


class SlowReader(RequestTimeout):
    """A client that does not read a piece of an answer in time.

    Attributes:
        writing: ends when the client has read the piece or disconnected. Until then gRPC cannot end the call.
    """

    def __init__(self, writing: asyncio.Task[None], within_s: float) -> None:
        super().__init__(
            f"A piece of the answer was not read within {within_s:g} s.", hint="Read answers as they come."
        )
        self.writing = writing


async def write(rpc: Any, piece: Any, within_s: float) -> None:
    """Write a piece of an answer once the client's window has room for it.

    Raises:
        SlowReader: there was no room in time; `MalformedRequestInterceptor` ends the call.
    """
    writing = asyncio.ensure_future(rpc.write(piece))
    # The waiting task may be cancelled: then the result must be retrieved here.
    writing.add_done_callback(lambda task: task.cancelled() or task.exception())
    done, _ = await asyncio.wait({writing}, timeout=within_s)
    if not done:
        raise SlowReader(writing, within_s)
    writing.result()


class MalformedRequestInterceptor(grpc.aio.ServerInterceptor):
    """Ends calls with malformed requests, and calls whose answers are not read in time.

    A malformed request in a stream ends the call once the requests before it are answered.
    """

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Wrap the call's handler; None if there is none."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        name = ("stream" if handler.request_streaming else "unary", "stream" if handler.response_streaming else "unary")
        behaviour = _as_writer(getattr(handler, "_".join(name)))

        async def guarded(request: Any, rpc: Any) -> Any:
            """Handle a request, or the requests of a stream."""
            stream = _ParsedRequests(request) if handler.request_streaming else None
            if request is None:
                await abort(rpc, _malformed())
            error: PemaError | None = None
            answer = None
            try:
                answer = await behaviour(request if stream is None else stream.until_malformed(), rpc)
            except* SlowReader as group:
                error = _first(group)
                await asyncio.wait({error.writing})
            if stream is not None and stream.is_malformed:
                error = _malformed()
            if error is not None:
                await abort(rpc, error)
            return answer

        make = _HANDLERS[handler.request_streaming, handler.response_streaming]
        return make(guarded, _parse_or_none(handler.request_deserializer), handler.response_serializer)


def _first(group: BaseExceptionGroup[SlowReader]) -> SlowReader:
    """The first exception of a group that may hold groups."""
    first = group.exceptions[0]
    return first if isinstance(first, SlowReader) else _first(first)


class _ParsedRequests:
    """The requests of a stream, up to the first malformed one."""

    def __init__(self, requests: AsyncIterator[Any]) -> None:
        self._requests = requests
        self.is_malformed = False

    async def until_malformed(self) -> AsyncIterator[Any]:
        async for request in self._requests:
            if request is None:
                self.is_malformed = True
                return
            yield request


def _parse_or_none(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A parser that returns None for malformed bytes."""

    def parse_or_none(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            return None

    return parse_or_none


def _as_writer(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    """A handler that writes its answers, made from one that may yield them."""
    if not inspect.isasyncgenfunction(behaviour):
        return behaviour

    async def writing(request: Any, rpc: Any) -> None:
        async for answer in behaviour(request, rpc):
            await rpc.write(answer)

    return writing


def _malformed() -> MalformedMessage:
    return MalformedMessage(
        "The bytes are no message of this call.", hint="protocol/pema.proto describes the messages."
    )

"""How gRPC calls are refused, also those whose bytes are no message: gRPC takes these for a fault of the server."""

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


async def abort(context: Any, error: PemaError) -> None:
    """End a call with an error, its problem document included; raises what gRPC ends a handler with."""
    problem = (PROBLEM_METADATA, json.dumps(to_problem(error)).encode())
    metadata = (*(context.trailing_metadata() or ()), problem)
    await context.abort(grpc.StatusCode[error.grpc_status], error.detail, metadata)


class SlowReader(RequestTimeout):
    """A piece of an answer that the client does not read.

    Attributes:
        writing: ends when it has read it, or is gone. Until then gRPC can do nothing else with the call.
    """

    def __init__(self, writing: asyncio.Task[None], within_s: float) -> None:
        super().__init__(
            f"A piece of the answer was not read within {within_s:g} s.", hint="Read answers as they come."
        )
        self.writing = writing


async def write(context: Any, piece: Any, within_s: float) -> None:
    """Write a piece of an answer once there is room for it.

    Raises:
        Unread: there is none in time; `MalformedRequestInterceptor` ends the call.
    """
    writing = asyncio.ensure_future(context.write(piece))
    # Whoever waits for it may be cancelled: then nobody asks how it ended.
    writing.add_done_callback(lambda task: task.cancelled() or task.exception())
    done, _ = await asyncio.wait({writing}, timeout=within_s)
    if not done:
        raise SlowReader(writing, within_s)
    writing.result()


class MalformedRequestInterceptor(grpc.aio.ServerInterceptor):
    """Ends calls with bytes that are no message, those of a stream once what came before them is answered.

    And calls whose answers are not read, wherever in a stream's tasks that was noticed.
    """

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """The call's handler, or None if there is none."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        name = ("stream" if handler.request_streaming else "unary", "stream" if handler.response_streaming else "unary")
        behaviour = _as_writer(getattr(handler, "_".join(name)))

        async def guarded(given: Any, context: Any) -> Any:
            requests = _Decodable(given) if handler.request_streaming else None
            if given is None:
                await abort(context, _undecodable())
            refusal: PemaError | None = None
            answer = None
            try:
                answer = await behaviour(given if requests is None else requests.until_undecodable(), context)
            except* SlowReader as unread:
                refusal = _first(unread)
                await asyncio.wait({refusal.writing})
            if requests is not None and requests.undecodable:
                refusal = _undecodable()
            if refusal is not None:
                await abort(context, refusal)
            return answer

        make = _HANDLERS[handler.request_streaming, handler.response_streaming]
        return make(guarded, _parse_or_none(handler.request_deserializer), handler.response_serializer)


def _first(group: BaseExceptionGroup[SlowReader]) -> SlowReader:
    """One of the exceptions of a group that may hold groups."""
    found = group.exceptions[0]
    return found if isinstance(found, SlowReader) else _first(found)


class _Decodable:
    """The requests of a stream, up to one that is none."""

    def __init__(self, given: AsyncIterator[Any]) -> None:
        self._given = given
        self.undecodable = False

    async def until_undecodable(self) -> AsyncIterator[Any]:
        async for request in self._given:
            if request is None:
                self.undecodable = True
                return
            yield request


def _parse_or_none(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Gives None for what is no message."""

    def parse_or_none(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            return None

    return parse_or_none


def _as_writer(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    """A handler that writes its answers, of one that may yield them."""
    if not inspect.isasyncgenfunction(behaviour):
        return behaviour

    async def writing(given: Any, context: Any) -> None:
        async for answer in behaviour(given, context):
            await context.write(answer)

    return writing


def _undecodable() -> MalformedMessage:
    return MalformedMessage(
        "The bytes are no message of this call.", hint="protocol/pema.proto describes the messages."
    )

"""Load of `encode` requests that are serialised once and sent over either transport, with the outcome of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any, Protocol

import grpc
import httpx

from protocol import pema_pb2, pema_pb2_grpc
from protocol.codec import BINARY
from protocol.messages import EncodeRequest
from protocol.protobuf import KEY_METADATA, PROBLEM_METADATA, to_proto

ANSWERED = "answered"
REFUSED = "refused"
"""Refused with 429, or its equivalent over gRPC, and a time to retry."""


class Wire(Protocol):
    """Sends prepared requests over one transport."""

    async def send(self, tenant: int, text: int) -> str:
        """Send a request. Return its outcome: `ANSWERED`, `REFUSED`, or a description of an unexpected one."""
        ...


class Rest:
    """Load over HTTP, with a client for each tenant.

    Args:
        stack: closes the clients.
        port: port of the server.
        keys: keys of the tenants.
        requests: requests, one for each text.
    """

    def __init__(
        self, stack: AsyncExitStack, port: int, keys: Sequence[str], requests: Sequence[EncodeRequest]
    ) -> None:
        self._bodies = [request.to_bytes() for request in requests]
        self._clients = [
            httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{port}",
                headers={"Authorization": f"Bearer {key}", "Content-Type": BINARY},
                timeout=None,  # noqa: S113 - the server answers or refuses every request
                limits=httpx.Limits(max_connections=None, keepalive_expiry=2.0),
                trust_env=False,
            )
            for key in keys
        ]
        for client in self._clients:
            stack.push_async_callback(client.aclose)

    async def send(self, tenant: int, text: int) -> str:
        try:
            response = await self._clients[tenant].post("/v1/encode", content=self._bodies[text])
        except httpx.TransportError as error:
            return type(error).__name__
        if response.status_code == httpx.codes.OK:
            return ANSWERED
        if response.status_code != httpx.codes.TOO_MANY_REQUESTS:
            return f"HTTP {response.status_code}"
        return REFUSED if response.headers.get("retry-after", "").isdecimal() else "429 without retry-after"


class Grpc:
    """Load over gRPC, with a channel for each tenant and a stream for each request.

    Args:
        stack: closes the channels.
        port: port of the server.
        keys: keys of the tenants.
        requests: requests, one for each text.
    """

    def __init__(
        self, stack: AsyncExitStack, port: int, keys: Sequence[str], requests: Sequence[EncodeRequest]
    ) -> None:
        protos = [to_proto(request, pema_pb2.EncodeRequest()) for request in requests]
        self._calls = [pema_pb2.EncodeCall(request_id=str(i), request=proto) for i, proto in enumerate(protos)]
        self._metadata = [((KEY_METADATA, f"Bearer {key}"),) for key in keys]
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) for _ in keys]
        self._stubs: list[Any] = [pema_pb2_grpc.PlmStub(channel) for channel in channels]  # type: ignore[no-untyped-call]
        for channel in channels:
            stack.push_async_callback(channel.close)

    async def send(self, tenant: int, text: int) -> str:
        call = self._stubs[tenant].Encode(iter([self._calls[text]]), metadata=self._metadata[tenant])
        try:
            async for piece in call:
                if piece.HasField("problem"):
                    problem = {item.name: value for item, value in piece.problem.ListFields()}
                    return _outcome(problem)
                if piece.last:
                    return ANSWERED
        except grpc.aio.AioRpcError as error:
            problem_json = dict(error.trailing_metadata() or ()).get(PROBLEM_METADATA)
            return error.code().name if problem_json is None else _outcome(json.loads(problem_json))
        finally:
            call.cancel()
        return "half an answer"


def _outcome(problem: dict[str, Any]) -> str:
    if problem.get("status") != httpx.codes.TOO_MANY_REQUESTS:
        return f"problem {problem.get('status')}"
    return REFUSED if "retry_after_s" in problem else "429 without retry-after"

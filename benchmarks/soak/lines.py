"""Connections of one tenant to a server over REST or gRPC, without retries."""

from __future__ import annotations

import json
import random
from typing import Any, Protocol

import grpc
import httpx

from benchmarks.soak.calls import Call, Kind
from protocol import pema_pb2, pema_pb2_grpc
from protocol.chunks import join_head, join_rows
from protocol.codec import BINARY, JSON, Message
from protocol.errors import from_problem
from protocol.messages import DecodeResponse, DistributionResponse, EncodeResponse, HeadRequest, HeadRows, ModelCard
from protocol.protobuf import KEY_METADATA, PROBLEM_METADATA, from_proto, to_proto

TIMEOUT_SECONDS = 60.0
"""Longest wait for an answer; a longer one is a hang."""
_PATHS: dict[Kind, tuple[str, type[Message]]] = {
    "card": ("/v1/model", ModelCard),
    "head": ("/v1/lm-head", HeadRows),
    "encode": ("/v1/encode", EncodeResponse),
    "decode": ("/v1/decode", DecodeResponse),
    "distribution": ("/v1/next-token-distribution", DistributionResponse),
}
_JSON_SHARE = 0.1  # of the calls over REST


class Lost(Exception):
    """Raised when there is no connection, or it ends before the answer."""


class Line(Protocol):
    """A tenant's connection to a server over one transport."""

    async def ask(self, call: Call) -> Any:
        """The answer.

        Raises:
            PemaError: the server refused the call.
            Lost: there is no answer.
        """
        ...

    async def close(self) -> None:
        """Close the connection."""
        ...


class RestLine:
    """Connection over HTTP.

    Args:
        port: port of the server.
        key: key of the tenant.
        chance: chooses between the binary form and JSON.
    """

    def __init__(self, port: int, key: str, chance: random.Random) -> None:
        self._chance = chance
        self._http = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": f"Bearer {key}"},
            timeout=TIMEOUT_SECONDS,
            # Shorter than the server's, so that the server does not close a connection just as we send.
            limits=httpx.Limits(max_connections=None, keepalive_expiry=2.0),
            trust_env=False,
        )

    async def ask(self, call: Call) -> Any:
        path, answer = _PATHS[call.kind]
        form = JSON if self._chance.random() < _JSON_SHARE else BINARY
        headers, request = {"Accept": form, "Content-Type": form}, call.request
        try:
            if request is None or (isinstance(request, HeadRequest) and request.token_ids is None):
                parameters = {} if request is None else request.model_dump(include={"start", "stop", "dtype"})
                response = await self._http.get(path, params=parameters, headers={"Accept": form})
            else:
                body = request.to_json() if form == JSON else request.to_bytes()
                response = await self._http.post(path, content=body, headers=headers)
        except httpx.TransportError as error:
            raise Lost(type(error).__name__) from error
        if not response.is_success:
            raise from_problem(_object(response.content), response.status_code)
        is_binary = response.headers.get("content-type", "").startswith(BINARY)
        return answer.from_bytes(response.content) if is_binary else answer.from_json(response.content)

    async def close(self) -> None:
        await self._http.aclose()


class GrpcLine:
    """Connection over gRPC, with a separate stream for each call of a streaming method.

    Args:
        port: port of the server.
        key: key of the tenant.
    """

    def __init__(self, port: int, key: str) -> None:
        # Otherwise all tenants would share a connection.
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)])
        self._stub: Any = pema_pb2_grpc.PlmStub(self._channel)  # type: ignore[no-untyped-call]
        self._options: dict[str, Any] = {"metadata": ((KEY_METADATA, f"Bearer {key}"),), "timeout": TIMEOUT_SECONDS}

    async def ask(self, call: Call) -> Any:
        try:
            return await self._ask(call)
        except grpc.aio.AioRpcError as error:
            problem = dict(error.trailing_metadata() or ()).get(PROBLEM_METADATA)
            if problem is None:
                raise Lost(error.code().name) from error
            raise from_problem(_object(problem), 500) from error

    async def _ask(self, call: Call) -> Any:
        stub, options, request = self._stub, self._options, call.request
        if request is None:
            return from_proto(await stub.GetModelCard(pema_pb2.GetModelCardRequest(), **options), ModelCard)
        if call.kind == "head":
            rows = stub.GetLmHead(to_proto(request, pema_pb2.HeadRequest()), **options)
            return join_head([from_proto(piece, HeadRows) async for piece in rows])
        if call.kind == "distribution":
            message = to_proto(request, pema_pb2.DistributionRequest())
            return from_proto(await stub.GetNextTokenDistribution(message, **options), DistributionResponse)
        if call.kind == "encode":
            encode = pema_pb2.EncodeCall(request_id="1", request=to_proto(request, pema_pb2.EncodeRequest()))
            return await self._rows(stub.Encode(iter([encode]), **options), EncodeResponse)
        decode = pema_pb2.DecodeCall(request_id="1", request=to_proto(request, pema_pb2.DecodeRequest()))
        return await self._rows(stub.Decode(iter([decode]), **options), DecodeResponse)

    async def _rows(self, stream: Any, answer: type[EncodeResponse | DecodeResponse]) -> Any:
        pieces: list[Any] = []
        try:
            async for piece in stream:
                if piece.HasField("problem"):
                    problem = {item.name: value for item, value in piece.problem.ListFields()}
                    raise from_problem(problem, piece.problem.status)
                pieces.append(from_proto(piece.rows, answer))
                if piece.last:
                    return join_rows(pieces)
        finally:
            stream.cancel()
        raise Lost("half an answer")

    async def close(self) -> None:
        await self._channel.close()


def _object(text: bytes) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None

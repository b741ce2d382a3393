"""Three misbehaving tenants: one floods, one breaks off calls or never reads, one sends garbage."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import grpc
import httpx

from benchmarks.soak.calls import draw
from benchmarks.soak.lines import TIMEOUT_SECONDS
from benchmarks.soak.replicas import Replica
from benchmarks.soak.tenants import Price, Tenant
from benchmarks.soak.traffic import Traffic
from protocol.codec import BINARY, JSON
from protocol.messages import EncodeRequest
from protocol.protobuf import KEY_METADATA

FLOOD_RATE = 40.0
"""Calls a second; they request about fifty times their tenant's quota."""
_UNREAD_SEQUENCES = 64  # of an answer that is never read: several hundred KiB
_VALID = {"token_ids": [[5, 6]], "from_position": [0]}
_BAD_FIELDS: Sequence[dict[str, Any]] = (
    {"token_ids": [[10**9]]},
    {"token_ids": [[-1, 4]]},
    {"token_ids": [[]]},
    {"token_ids": []},
    {"token_ids": "text"},
    {"from_position": [7]},
    {"from_position": [0, 0]},
    {"echo": [1]},
    {"dtype": "float64"},
    {"unknown": 1},
)


async def flood(traffic: Traffic, tenant: Tenant) -> None:
    """Send far more calls than the quota admits, at random times, until cancelled."""
    while True:
        await asyncio.sleep(tenant.chance.expovariate(FLOOD_RATE))
        traffic.spawn(traffic.once(tenant))


async def cut(traffic: Traffic, tenant: Tenant, rate: float) -> None:
    """Send incomplete bodies, never read answers and cancel calls, at random, until cancelled."""
    ways = (_half_a_body, _never_read, _given_up)
    while True:
        await asyncio.sleep(tenant.chance.expovariate(rate))
        replica = tenant.chance.choice(traffic.replicas)
        (way,) = tenant.chance.choices(ways, [10, 1, 10])
        traffic.spawn(way(traffic, tenant, replica))


async def garbage(traffic: Traffic, tenant: Tenant, rate: float) -> None:
    """Send malformed calls until cancelled. Each must be refused as the caller's mistake."""
    while True:
        await asyncio.sleep(tenant.chance.expovariate(rate))
        replica = tenant.chance.choice(traffic.replicas)
        traffic.spawn((_bad_http if tenant.chance.random() < 0.6 else _bad_grpc)(traffic, tenant, replica))


def _raw_request(tenant: Tenant, body: bytes) -> bytes:
    head = f"POST /v1/encode HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {tenant.key}\r\n"
    return f"{head}Content-Type: {BINARY}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def _many_sequences(traffic: Traffic, tenant: Tenant) -> tuple[bytes, Price]:
    ids = [one.ids for one in tenant.chance.choices(traffic.truth.pool, k=_UNREAD_SEQUENCES)]
    request = EncodeRequest(token_ids=ids, from_position=[0] * len(ids), dtype="float32")
    return request.to_bytes(), Price(sum(map(len, ids)))


async def _half_a_body(traffic: Traffic, tenant: Tenant, replica: Replica) -> None:
    """Send an incomplete body, which is never a call and costs nothing."""
    body, _ = _many_sequences(traffic, tenant)
    whole = _raw_request(tenant, body)
    with suppress(OSError):
        _, writer = await asyncio.open_connection("127.0.0.1", replica.port("http"))
        writer.write(whole[: len(whole) - tenant.chance.randint(1, len(body))])
        await asyncio.sleep(tenant.chance.uniform(0, 1))
        writer.transport.abort()


async def _never_read(traffic: Traffic, tenant: Tenant, replica: Replica) -> None:
    """Never read an answer that is larger than the socket's buffer."""
    body, price = _many_sequences(traffic, tenant)
    with socket.socket() as unread, suppress(OSError):
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        unread.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(unread, ("127.0.0.1", replica.port("http")))
        tenant.account.unanswered.append(price)
        await loop.sock_sendall(unread, _raw_request(tenant, body))
        await asyncio.sleep(tenant.chance.uniform(5, 20))


async def _given_up(traffic: Traffic, tenant: Tenant, replica: Replica) -> None:
    """Send a valid call and disconnect after some milliseconds, whether it is answered by then or not."""
    call = draw(traffic.truth, tenant)
    tenant.account.unanswered.append(call.price)
    line = replica.line(tenant, tenant.chance.choice(["http", "grpc"]))
    answering = asyncio.ensure_future(line.ask(call))
    await asyncio.wait([answering], timeout=tenant.chance.uniform(0, 0.02))
    answering.cancel()
    # This answer is not checked; those of other calls are.
    await asyncio.wait([answering])
    if not answering.cancelled():
        answering.exception()


async def _bad_http(traffic: Traffic, tenant: Tenant, replica: Replica) -> None:
    chance = tenant.chance
    if chance.random() < 0.5:
        kind, content = chance.choice([BINARY, JSON, "text/plain"]), chance.randbytes(chance.randint(0, 400))
    else:
        kind, content = JSON, json.dumps(_VALID | chance.choice(_BAD_FIELDS)).encode()
    path = chance.choice(["/v1/encode", "/v1/decode", "/v1/lm-head", "/v1/next-token-distribution", "/v1/other"])
    headers = {"Authorization": f"Bearer {tenant.key}", "Content-Type": kind}
    was_up, kills = replica.up, replica.kills
    url = f"http://127.0.0.1:{replica.port('http')}{path}"
    try:
        async with httpx.AsyncClient(timeout=TIMEOUT_SECONDS, trust_env=False) as client:
            response = await client.post(url, content=content, headers=headers)
        outcome = response.status_code
    except httpx.TransportError:
        outcome = 0
    if was_up and replica.up and replica.kills == kills and not 400 <= outcome < 500:
        traffic.record.unexpected[f"garbage for {path}: {outcome}"] += 1


async def _bad_grpc(traffic: Traffic, tenant: Tenant, replica: Replica) -> None:
    chance = tenant.chance
    method = chance.choice(["GetLmHead", "GetNextTokenDistribution", "Other"])
    was_up, kills = replica.up, replica.kills
    metadata = ((KEY_METADATA, f"Bearer {tenant.key}"),)
    content = b"\xff" + chance.randbytes(chance.randint(0, 400))  # no message begins with this
    async with grpc.aio.insecure_channel(
        f"127.0.0.1:{replica.port('grpc')}", [("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        call: Any = channel.unary_stream(f"/pema.v1.Plm/{method}")
        code = "OK"
        try:
            async for _ in call(content, timeout=TIMEOUT_SECONDS, metadata=metadata):
                pass
        except grpc.aio.AioRpcError as error:
            code = error.code().name
    refused = code in ("INVALID_ARGUMENT", "UNIMPLEMENTED", "OUT_OF_RANGE", "PERMISSION_DENIED")
    if was_up and replica.up and replica.kills == kills and not refused:
        traffic.record.unexpected[f"garbage for {method}: {code}"] += 1

"""Clients that take their time, or too much: each is bounded, and the others are answered meanwhile."""

from __future__ import annotations

import gzip
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

import grpc
import pytest

from harness.tiny_models import TinyModels
from plm_owner_server.service.plm_service import PlmService
from protocol import pema_pb2, pema_pb2_grpc
from protocol.codec import JSON
from protocol.errors import UnsupportedMediaType
from protocol.messages import DistributionRequest, EncodeRequest, HeadRequest
from protocol.protobuf import to_proto
from tests import guard
from tests.support import make_service, serve, serve_over_grpc
from tests.wire.test_service import checked_problem

SOON_S = 0.4
FINE = EncodeRequest(token_ids=[[5, 6]], from_position=[0])
BEGUN = {
    "head": b"GET /v1/model HTTP/1.1\r\nX-A: ",
    "body": b"Content-Length: 500\r\n\r\n{",
    "chunks": b"Transfer-Encoding: chunked\r\n\r\n",
}


def head(line: str = "POST /v1/encode") -> bytes:
    """The beginning of a request, as far as every call's is the same."""
    fields = guard.headers(Host="localhost") | {"Content-Type": JSON}
    return "\r\n".join([f"{line} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), ""]).encode()


@pytest.fixture(scope="module")
def impatient(tiny_service: PlmService) -> Iterator[str]:
    with serve(tiny_service, transfer_s=SOON_S, max_connections=4) as url:
        yield url


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    parts = urlsplit(url)
    with (
        socket.create_connection((parts.hostname, parts.port), timeout=60) as bare,
        guard.encrypted(bare) as client,
    ):
        yield client


def rest_of(client: socket.socket) -> bytes:
    """All that the server sends until it hangs up."""
    received = b""
    with suppress(ConnectionResetError):
        while part := client.recv(2**16):
            received += part
    return received


def trickled(client: socket.socket, data: bytes) -> bytes:
    """The server's answer to a client that sends one byte at a time."""
    client.settimeout(SOON_S / 20)
    for byte in data * 1000:
        with suppress(TimeoutError):
            client.sendall(bytes([byte]))
            said = client.recv(2**16)
            break
    client.settimeout(60)
    return said + rest_of(client)


def send_for_ever(client: socket.socket, data: bytes) -> None:
    while True:
        client.sendall(data)


def answered(url: str) -> bool:
    with guard.http(url) as http:
        return http.post("/v1/encode", content=FINE.to_json(), headers={"Content-Type": JSON}).is_success


@pytest.mark.parametrize("part", BEGUN)
def test_a_request_that_trickles_is_408(impatient: str, part: str) -> None:
    with connected(impatient) as client:
        client.sendall(b"" if part == "head" else head())
        client.sendall(BEGUN[part])
        told = trickled(client, b"1\r\n \r\n" if part == "chunks" else b"a")
    assert told.startswith(b"HTTP/1.1 408 ")
    assert b"urn:pema:error:too-slow" in told
    assert answered(impatient)


def test_a_connection_that_says_nothing_is_closed_without_a_word(impatient: str) -> None:
    with connected(impatient) as client:
        assert rest_of(client) == b""
    # Nor is one that goes on after an answer.
    with connected(impatient) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert rest_of(client).startswith(b"HTTP/1.1 200 ")


def test_a_large_body_may_take_longer_than_a_small_one(tiny_service: PlmService) -> None:
    size = 3 * 2**20
    with serve(tiny_service, max_body_bytes=size, transfer_s=1.0) as url, connected(url) as client:
        client.sendall(head() + f"Content-Length: {size}\r\n\r\n".encode())
        for _ in range(8):
            client.sendall(b" " * (size // 8))
            time.sleep(0.25)
        assert client.recv(12) == b"HTTP/1.1 400"  # spaces are no JSON, but they all arrived


def test_a_body_that_says_that_it_is_too_large_is_refused_before_it_is_read(impatient: str) -> None:
    with connected(impatient) as client:
        client.sendall(head() + b"Content-Length: 99999999999\r\n\r\n")
        assert client.recv(12) == b"HTTP/1.1 413"


def test_what_goes_on_after_its_refusal_is_cut_off(tiny_service: PlmService) -> None:
    """Discarding without end would keep a core busy; the answer is given time to be read."""
    chunk = b"10000\r\n" + b" " * 2**16 + b"\r\n"
    with serve(tiny_service, max_body_bytes=2**20, transfer_s=SOON_S) as url, connected(url) as client:
        client.sendall(head() + b"Transfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(OSError, match=r"reset|Broken pipe|EOF"):
            send_for_ever(client, chunk)


@pytest.mark.parametrize("encoding", ["gzip", "br", "x-gzip, identity"])
def test_a_compressed_body_is_415(impatient: str, encoding: str) -> None:
    bomb = gzip.compress(b" " * 2**24)
    headers = {"Content-Type": JSON, "Content-Encoding": encoding}
    with guard.http(impatient) as http:
        error = checked_problem(http.post("/v1/encode", content=bomb, headers=headers))
    assert type(error) is UnsupportedMediaType


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_a_compressed_message_is_refused(tiny_service: PlmService, compression: grpc.Compression) -> None:
    bomb = to_proto(DistributionRequest(text=" " * 2**22), pema_pb2.DistributionRequest())
    with serve_over_grpc(tiny_service, max_body_bytes=2**16) as url:
        options = [("grpc.max_send_message_length", -1)]
        with guard.channel(url, options, compression) as channel, pytest.raises(grpc.RpcError) as caught:
            pema_pb2_grpc.PlmStub(channel).GetNextTokenDistribution(bomb, timeout=60)  # type: ignore[no-untyped-call]
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        connection = guard.connection(url)
        assert len(connection.encode(FINE).cr_N_D) == 2
        connection.close()


def test_an_answer_that_is_not_read_is_cut_off(tiny_models: TinyModels) -> None:
    request = head("GET /v1/tokenizer") + b"\r\n"
    with serve(make_service(tiny_models["llama"]), transfer_s=SOON_S) as url, connected(url) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with pytest.raises(OSError, match=r"reset|Broken pipe|EOF"):
            send_for_ever(client, request)  # until the server's own buffers are full, and it stops reading
        assert answered(url)


def test_one_connection_too_many_takes_the_place_of_an_idle_one(impatient: str) -> None:
    with connected(impatient) as first, connected(impatient), connected(impatient), connected(impatient):
        assert answered(impatient)
        assert rest_of(first) == b""


def test_an_answer_over_grpc_that_is_not_read_is_ended(
    tiny_service: PlmService, caplog: pytest.LogCaptureFixture
) -> None:
    much = to_proto(HeadRequest(token_ids=[3] * 300_000, dtype="float32"), pema_pb2.HeadRequest())
    encode = EncodeRequest(token_ids=[[5] * 100] * 500, from_position=[0] * 500, dtype="float32")
    call = pema_pb2.EncodeCall(request=to_proto(encode, pema_pb2.EncodeRequest()))
    with serve_over_grpc(tiny_service, transfer_s=SOON_S) as url:
        # With a window that does not grow: on a busy machine, whole answers could wait at the client.
        fixed = [("grpc.http2.bdp_probe", 0)]
        with guard.channel(url, fixed) as channel:
            stub = pema_pb2_grpc.PlmStub(channel)  # type: ignore[no-untyped-call]
            for pieces in (
                stub.GetLmHead(much, timeout=60, wait_for_ready=True),  # the handshake may be cut off, too
                stub.Encode(iter([call] * 4), timeout=60),
            ):
                next(pieces)
                while tiny_service.scheduler.load().running_requests:  # on a busy machine, for a while
                    time.sleep(SOON_S / 10)
                time.sleep(6 * SOON_S)
                with pytest.raises(grpc.RpcError) as caught:
                    list(pieces)
                assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        connection = guard.connection(url)
        assert len(connection.encode(FINE).cr_N_D) == 2
        connection.close()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]

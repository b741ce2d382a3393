"""Gateways before a server that cut long or large calls: the same work is done in smaller requests."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import safetensors.torch
import torch

from data_owner_client import InProcessConnection, Pair, RemotePlm, Task, build_memories
from data_owner_client.memory.types import ContextMode
from data_owner_client.plm.connection import retries
from data_owner_client.plm.connection.base import Attempt, Connection
from data_owner_client.plm.connection.open import open_connection
from harness.proxies import Record, grpc_gateway, http_gateway
from harness.tcp_proxy import Fault, faulty_proxy
from plm_owner_server.service.plm_service import PlmService
from protocol import errors, pema_pb2
from protocol.integrity import token_crc32s
from protocol.messages import DecodeRequest, EncodeRequest, HeadRequest
from protocol.protobuf import to_proto
from tests.support import random_ids, serve_over_grpc

pytestmark = pytest.mark.unguarded("a gateway that reads what passes")

TASK = Task(name="t", source_label="In", target_label="Out")
IDS = random_ids(3, [9, 30, 4, 17, 25, 8, 40, 12, 6, 21, 33])
ENCODE = EncodeRequest(token_ids=IDS, from_position=[2] * len(IDS), dtype="float32", with_logsumexp=True)
DECODE = DecodeRequest(token_ids=IDS, look_ahead=[i % 4 for i in range(len(IDS))], dtype="float32")
LONGEST = EncodeRequest(token_ids=[max(IDS, key=len)], from_position=[2], dtype="float32", with_logsumexp=True)


@dataclass(frozen=True)
class Way:
    """A server of the tiny model, reached over one transport."""

    scheme: str
    url: str

    def size(self, request: EncodeRequest) -> int:
        """Bytes of the body or message of a request."""
        if self.scheme == "http":
            return len(request.to_bytes())
        return int(to_proto(request, pema_pb2.EncodeRequest()).ByteSize())

    @contextmanager
    def gateway(self, most_bytes: int, status: int, **settings: Any) -> Iterator[tuple[Record, Connection]]:
        """A gateway that refuses larger requests, and a connection through it."""
        if self.scheme == "http":
            made = http_gateway(self.url, most_bytes=most_bytes, status=status)
        else:
            made = grpc_gateway(urlsplit(self.url).port or 0, most_bytes=most_bytes, status=status)
        with made as record:
            connection = open_connection(f"{self.scheme}://127.0.0.1:{record.port}", **settings)
            yield record, connection
            connection.close()


@pytest.fixture(params=["http", "grpc"])
def way(request: pytest.FixtureRequest, tiny_server: str, tiny_service: PlmService) -> Iterator[Way]:
    if request.param == "http":
        yield Way("http", tiny_server)
    else:
        with serve_over_grpc(tiny_service) as url:
            yield Way("grpc", url)


@pytest.mark.parametrize("status", [408, 413, 504, 524])
def test_large_requests_are_divided_until_they_pass(way: Way, tiny_service: PlmService, status: int) -> None:
    with way.gateway(way.size(LONGEST) + 100, status) as (record, connection):
        encoded, decoded = connection.encode(ENCODE), connection.decode(DECODE)
    assert record.refused
    whole = tiny_service.encode(ENCODE)
    assert encoded.echo == whole.echo
    assert encoded.rows_B.tolist() == whole.rows_B.tolist()
    torch.testing.assert_close(encoded.cr_N_D, whole.cr_N_D)
    torch.testing.assert_close(encoded.logsumexp_N, whole.logsumexp_N)
    drafted = tiny_service.decode(DECODE)
    assert decoded.echo == drafted.echo
    assert decoded.rows_B.tolist() == drafted.rows_B.tolist()
    assert decoded.top1_N.tolist() == drafted.top1_N.tolist()
    torch.testing.assert_close(decoded.cr_N_D, drafted.cr_N_D)


def test_later_requests_are_small_from_the_start_and_it_is_said_once(
    way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = list[Attempt]()
    with caplog.at_level(logging.WARNING), way.gateway(way.size(LONGEST) + 100, 504) as (record, connection):
        connection.observers.append(attempts.append)
        connection.encode(ENCODE)
        refusals, refused = len(record.refused), [attempt.refused for attempt in attempts]
        connection.encode(ENCODE)
    assert len(record.refused) == refusals
    assert sum(refused) == refusals  # fewer calls at once, too
    assert sum("Sending smaller requests" in line for line in caplog.messages) == 1


def test_rows_of_the_head_are_divided_too(tiny_server: str, tiny_service: PlmService) -> None:
    request = HeadRequest(token_ids=list(range(50, 80)), dtype="float32")
    half = HeadRequest(token_ids=list(range(50, 65)), dtype="float32")
    with Way("http", tiny_server).gateway(len(half.to_bytes()), 413) as (record, connection):
        head = connection.lm_head(request)
    assert len(record.refused) == 1
    assert torch.equal(head.weight_N_D, tiny_service.lm_head(request).weight_N_D)


def test_one_sequence_that_is_too_large_is_an_error(way: Way) -> None:
    with way.gateway(10, 413) as (_, connection), pytest.raises(errors.PayloadTooLarge, match="HTTP 413"):
        connection.encode(ENCODE)


def test_one_sequence_that_takes_too_long_is_tried_again(way: Way) -> None:
    with (
        way.gateway(10, 504, retry_for=0.5) as (record, connection),
        pytest.raises(errors.GatewayTimeout, match="HTTP 504"),
    ):
        connection.encode(LONGEST)
    assert record.refused


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (302, errors.InvalidRequest),
        (401, errors.Unauthenticated),
        (403, errors.Forbidden),
        (404, errors.InvalidRequest),
        (429, errors.Overloaded),
        (500, errors.ServerFault),
        (502, errors.GatewayFailed),
        (503, errors.NotReady),
        (520, errors.GatewayFailed),
        (530, errors.GatewayFailed),
    ],
)
def test_a_status_of_a_gateway_means_the_same_on_both_transports(
    way: Way, status: int, kind: type[errors.PemaError]
) -> None:
    with way.gateway(10, status, retry_for=0) as (_, connection), pytest.raises(kind, match=str(status)) as caught:
        connection.encode(LONGEST)
    assert type(caught.value) is kind


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    ("location", "hint"),
    [
        ("{other}/v1/model", "--server {other}$"),
        ("{other}/new/v1/model", "--server {other}/new$"),
        ("{other}/login?to=plm", "page of a login"),
        ("/new/v1/model", "--server {self}/new$"),
    ],
)
def test_a_redirect_is_not_followed_but_named(tiny_server: str, status: int, location: str, hint: str) -> None:
    with http_gateway(tiny_server, most_bytes=10**6, status=500) as other:
        names = {"other": f"http://127.0.0.1:{other.port}"}
        place = location.format(**names)
        with http_gateway(tiny_server, most_bytes=-1, status=status, location=place) as record:
            names["self"] = f"http://127.0.0.1:{record.port}"
            with (
                closing(open_connection(names["self"], api_key="secret-key")) as connection,
                pytest.raises(errors.InvalidRequest, match=f"HTTP {status}") as caught,
            ):
                connection.model_card()
    assert re.search(hint.format(**names), caught.value.hint)
    assert len(record.seen) == 1
    assert other.seen == []


@pytest.mark.parametrize("path", ["/v1", "/docs", "/v1/model"])
def test_a_path_that_is_not_the_servers_is_named(tiny_server: str, path: str) -> None:
    with (
        closing(open_connection(f"{tiny_server}{path}")) as connection,
        pytest.raises(errors.InvalidRequest) as caught,
    ):
        connection.model_card()
    assert caught.value.hint.endswith(f"Without it: {tiny_server}")


def test_a_server_may_be_below_a_path(tiny_server: str) -> None:
    with http_gateway(tiny_server, most_bytes=10**6, status=404, prefix="/pema") as record:
        with closing(open_connection(f"http://127.0.0.1:{record.port}/pema/")) as connection:
            assert connection.model_card().name == "llama"
            assert connection.encode(ENCODE).echo == token_crc32s(IDS)
            assert len(connection.lm_head(HeadRequest(start=3, stop=8)).weight_N_D) == 5
        assert record.refused == []
        with (
            closing(open_connection(f"http://127.0.0.1:{record.port}")) as connection,
            pytest.raises(errors.InvalidRequest, match="HTTP 404") as caught,
        ):
            connection.model_card()
    assert "its path" in caught.value.hint


def test_requests_that_are_lost_on_the_way_are_divided(
    way: Way, tiny_service: PlmService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "_MIN_LOST_SECONDS", 0.0)
    # A gRPC server speaks first.
    attempts, cuts = list[Attempt](), [Fault("cut", 100)] * 4
    with (
        faulty_proxy(urlsplit(way.url).port or 0, cuts) as port,
        closing(open_connection(f"{way.scheme}://127.0.0.1:{port}")) as connection,
    ):
        connection.observers.append(attempts.append)
        answer = connection.encode(ENCODE)
    assert answer.echo == token_crc32s(IDS)
    torch.testing.assert_close(answer.cr_N_D, tiny_service.encode(ENCODE).cr_N_D)
    assert [attempt.refused for attempt in attempts] == [False, False]


@pytest.mark.parametrize("mode", ["private", "teacher-forced"])
def test_a_memory_through_a_gateway_is_the_same(
    way: Way, tiny_service: PlmService, tmp_path: Path, mode: ContextMode
) -> None:
    pairs = [Pair(f"the {i} houses", f"die {i} Häuser") for i in range(40)]

    def build(plm: RemotePlm, name: str) -> None:
        with plm:
            memory = tmp_path / name
            build_memories(plm, TASK, pairs, memory, validation=pairs[:4], context_mode=mode, share_targets=True)

    build(RemotePlm(InProcessConnection(tiny_service), cache=None), "direct")
    with way.gateway(2000, 504) as (record, connection):
        build(RemotePlm(connection, cache=None), "divided")
    assert record.refused
    files = [path.relative_to(tmp_path / "direct") for path in (tmp_path / "direct").rglob("*.safetensors")]
    assert files
    for file in files:
        direct, divided = (safetensors.torch.load_file(tmp_path / name / file) for name in ("direct", "divided"))
        torch.testing.assert_close(divided, direct)

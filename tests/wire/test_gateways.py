"""Gateways before a server that cut long or large calls: the same work is done in smaller requests."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from data_owner_client.plm.connection.base import Attempt, Connection
from data_owner_client.plm.connection.open import open_connection
from harness.proxies import Record, grpc_gateway, http_gateway
from plm_owner_server.service.plm_service import PlmService
from protocol import errors, pema_pb2
from protocol.messages import DecodeRequest, EncodeRequest, HeadRequest
from protocol.protobuf import to_proto
from tests.support import random_ids, serve_over_grpc

pytestmark = pytest.mark.unguarded("a gateway that reads what passes")

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

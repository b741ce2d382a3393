"""Requests that are too large for the way are divided: nothing is lost, doubled or reordered."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_owner_client.plm.connection import division
from data_owner_client.plm.connection.division import RequestDivision
from data_owner_client.plm.connection.settings import ConnectionSettings
from protocol import errors
from protocol.integrity import token_crc32s
from protocol.messages import DecodeRequest, EncodeRequest, EncodeResponse, HeadRequest, HeadRows
from tests.profiles import scaled

SEQUENCES = st.lists(st.lists(st.integers(0, 500), min_size=1, max_size=12), min_size=1, max_size=20)
TOO_LARGE = [errors.PayloadTooLarge, errors.GatewayTimeout, errors.TimedOut, errors.RequestTimeout, errors.AnswerLost]


class Server:
    """Answers requests of up to `most` sequences or rows; a row tells the token and the position that it stands for."""

    def __init__(self, most: int, error: type[errors.PemaError]) -> None:
        self.most, self.error = most, error
        self.sizes: list[int] = []

    def encode(self, request: EncodeRequest, divisible: bool) -> EncodeResponse:
        self._admit(len(request.token_ids), divisible)
        starts = request.from_position
        rows = [
            [float(token), float(at)]
            for ids, start in zip(request.token_ids, starts, strict=True)
            for at, token in enumerate(ids)
            if at >= start
        ]
        return EncodeResponse(
            digest="d",
            echo=request.echo or [],
            rows_B=torch.tensor([len(ids) - start for ids, start in zip(request.token_ids, starts, strict=True)]),
            cr_N_D=torch.tensor(rows).reshape(-1, 2),
        )

    def head(self, request: HeadRequest, divisible: bool) -> HeadRows:
        rows = request.token_ids if request.token_ids is not None else list(range(request.start, request.stop or 0))
        self._admit(len(rows), divisible)
        return HeadRows(digest="d", vocab_size=1000, weight_N_D=torch.tensor(rows, dtype=torch.float32).reshape(-1, 1))

    def _admit(self, size: int, divisible: bool) -> None:
        assert divisible == (size > 1)
        self.sizes.append(size)
        if size > self.most:
            raise self.error("No.")


@settings(max_examples=scaled(100))
@given(SEQUENCES, st.integers(1, 8), st.sampled_from(TOO_LARGE))
def test_the_parts_are_the_whole(ids: list[list[int]], most: int, error: type[errors.PemaError]) -> None:
    server, divided = Server(most, error), RequestDivision(ConnectionSettings())
    request = EncodeRequest(token_ids=ids, from_position=[len(row) // 2 for row in ids], echo=token_crc32s(ids))
    whole = Server(len(ids), error).encode(request, len(ids) > 1)
    for _ in range(2):
        answer = divided.rows(request, server.encode)
        assert answer.echo == whole.echo == token_crc32s(ids)
        assert answer.rows_B.tolist() == whole.rows_B.tolist()
        assert torch.equal(answer.cr_N_D, whole.cr_N_D)


@settings(max_examples=scaled(50))
@given(st.integers(0, 50), st.integers(1, 60), st.booleans(), st.integers(1, 8))
def test_the_rows_of_the_head_are_the_whole(start: int, rows: int, by_range: bool, most: int) -> None:
    ids = list(range(start, start + rows))
    request = HeadRequest(start=start, stop=start + rows) if by_range else HeadRequest(token_ids=ids)
    answer = RequestDivision(ConnectionSettings()).head(request, Server(most, errors.PayloadTooLarge).head)
    assert answer.weight_N_D.flatten().tolist() == ids


def test_parts_of_another_model_are_not_joined() -> None:
    digests = iter(["a", "b"])

    def send(request: HeadRequest, divisible: bool) -> HeadRows:
        if divisible:
            raise errors.PayloadTooLarge("No.")
        return HeadRows(digest=next(digests), vocab_size=9, weight_N_D=torch.zeros(1, 1))

    with pytest.raises(errors.ProtocolViolation, match="do not fit together"):
        RequestDivision(ConnectionSettings()).head(HeadRequest(token_ids=[1, 2]), send)


def test_drafts_go_with_their_prefixes() -> None:
    sent = list[DecodeRequest]()

    def send(request: DecodeRequest, divisible: bool) -> EncodeResponse:
        sent.append(request)
        if divisible:
            raise errors.GatewayTimeout("No.")
        raise errors.OverLimit("Enough.")

    request = DecodeRequest(token_ids=[[1], [2]], look_ahead=[3, 4], stop_token_ids=[9], echo=[5, 6])
    with pytest.raises(errors.OverLimit):
        RequestDivision(ConnectionSettings()).rows(request, send)
    assert sent[1] == DecodeRequest(token_ids=[[1]], look_ahead=[3], stop_token_ids=[9], echo=[5])


def test_requests_grow_again_after_many_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(division, "_ANSWERS_BEFORE_GROWTH", 4)
    server, divided = Server(1, errors.GatewayTimeout), RequestDivision(ConnectionSettings())
    request = HeadRequest(token_ids=[1, 2, 3, 4])
    divided.head(request, server.head)
    server.most = 4
    assert server.sizes[:2] == [4, 2]
    for _ in range(6):
        divided.head(request, server.head)
    assert server.sizes[-1] == 4


def test_a_server_that_hangs_is_not_waited_for_at_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    server, now = Server(0, errors.TimedOut), [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def send(request: HeadRequest, divisible: bool) -> HeadRows:
        now[0] += 600.0
        return server.head(request, divisible)

    with pytest.raises(errors.TimedOut):
        RequestDivision(ConnectionSettings(timeout=600, retry_for=300)).head(HeadRequest(start=0, stop=64), send)
    assert server.sizes == [64, 32, 16]  # 1500 s are over when the last one fails

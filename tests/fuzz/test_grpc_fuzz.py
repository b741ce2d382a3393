"""Any bytes, to every gRPC call: a status or a problem of ours, never a fault or a hang, and the server lives on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message as Proto
from hypothesis import given, settings
from hypothesis import strategies as st

from plm_owner_server.service.plm_service import PlmService
from protocol import pema_pb2
from protocol.messages import DecodeRequest, DistributionRequest, EncodeRequest, HeadRequest
from protocol.protobuf import PROBLEM_METADATA, to_proto
from tests import guard
from tests.profiles import scaled
from tests.support import serve_over_grpc

WITHIN_S = 60
METHODS = {method.name: method for method in pema_pb2.DESCRIPTOR.services_by_name["Plm"].methods}
ENCODE = to_proto(EncodeRequest(token_ids=[[5, 6, 7], [8]], from_position=[1, 0], echo=None), pema_pb2.EncodeRequest())
DECODE = to_proto(
    DecodeRequest(token_ids=[[5, 6]], look_ahead=[2], from_position=[0], stop_token_ids=[9]), pema_pb2.DecodeRequest()
)
GOOD: dict[str, Proto] = {
    "GetModelCard": pema_pb2.GetModelCardRequest(),
    "GetTokenizer": pema_pb2.GetTokenizerRequest(),
    "GetLmHead": to_proto(HeadRequest(token_ids=[3, 4]), pema_pb2.HeadRequest()),
    "Encode": pema_pb2.EncodeCall(request_id="a", request=ENCODE),
    "Decode": pema_pb2.DecodeCall(request_id="a", request=DECODE),
    "GetNextTokenDistribution": to_proto(DistributionRequest(text="the"), pema_pb2.DistributionRequest()),
}
REFUSALS = {grpc.StatusCode[name] for name in ("INVALID_ARGUMENT", "OUT_OF_RANGE", "UNIMPLEMENTED")}


@pytest.fixture(scope="module")
def channel(tiny_service: PlmService) -> Iterator[grpc.Channel]:
    with (
        serve_over_grpc(tiny_service) as url,
        guard.channel(url) as channel,
    ):
        yield channel


def answers(channel: grpc.Channel, name: str, *requests: bytes) -> list[bytes]:
    """The raw answers of a call to raw requests."""
    method, path = METHODS[name], f"/pema.v1.Plm/{name}"
    # Its stubs cannot tell what bytes are: nothing serialises them.
    raw: Any = channel
    if method.client_streaming:
        return list(raw.stream_stream(path)(iter(requests), timeout=WITHIN_S))
    if method.server_streaming:
        return list(raw.unary_stream(path)(requests[0], timeout=WITHIN_S))
    return [raw.unary_unary(path)(requests[0], timeout=WITHIN_S)]


def ended(channel: grpc.Channel, name: str, *requests: bytes) -> tuple[list[bytes], grpc.StatusCode]:
    """The raw answers, if there are any, and how the call ended."""
    try:
        return answers(channel, name, *requests), grpc.StatusCode.OK
    except grpc.RpcError as error:
        return [], error.code()


def varint(number: int) -> bytes:
    digits = [number >> shift & 127 for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([digit | 128 for digit in digits[:-1]] + digits[-1:])


@st.composite
def mutated(draw: st.DrawFn, message: Proto) -> bytes:
    """A good request with bytes changed, cut out, put in, or its end cut off."""
    data = bytearray(message.SerializeToString())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        end = at + draw(st.integers(0, 4))
        data[at:end] = draw(st.binary(max_size=4) | st.sampled_from([varint(2**63), varint(2**31), b"\xff" * 10]))
    return bytes(data)


@st.composite
def filled(draw: st.DrawFn, message_type: type[Proto], depth: int = 4) -> Proto:
    """A message with any values in any of its fields."""
    message = message_type()
    for field in message_type.DESCRIPTOR.fields:
        if not draw(st.booleans()):
            continue
        if field.message_type is not None:
            if depth:
                inner = draw(filled(getattr(pema_pb2, field.message_type.name), depth - 1))
                getattr(message, field.name).CopyFrom(inner)
            continue
        value = draw(st.lists(_VALUES[field.type], max_size=4) if field.is_repeated else _VALUES[field.type])
        if field.is_repeated:
            getattr(message, field.name).extend(value)
        else:
            setattr(message, field.name, value)
    return message


_small = st.integers(0, 9)
_VALUES: dict[int, st.SearchStrategy[Any]] = {
    1: st.floats(),  # double
    3: _small | st.integers(-(2**63), 2**63 - 1),  # int64
    8: st.booleans(),
    9: st.sampled_from(["float16", "int8", "chat", "plain", ""]) | st.text(max_size=8),
    12: st.lists(st.sampled_from([b"\5\0\0\0", b"\1\0\0\0", b"\xff\xff\xff\x7f"]), max_size=4).map(b"".join)
    | st.binary(max_size=9),  # bytes
    13: _small | st.integers(0, 2**32 - 1),  # uint32
}


@pytest.mark.parametrize("name", METHODS)
def test_any_bytes_are_understood_or_refused(
    channel: grpc.Channel, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = GOOD[name]
    request = st.one_of(
        st.binary(max_size=60),
        mutated(good),
        filled(type(good)).map(lambda message: message.SerializeToString()),
    )

    @settings(max_examples=scaled(120), database=None)
    @given(requests=st.lists(request, min_size=1, max_size=3))
    def understood_or_refused(requests: list[bytes]) -> None:
        pieces, status = ended(channel, name, *requests)
        refusals = REFUSALS | ({grpc.StatusCode.PERMISSION_DENIED} if guard.current else set())  # ranges of the head
        assert status in {grpc.StatusCode.OK, *refusals}
        piece_type: Any = {"Encode": pema_pb2.EncodePiece, "Decode": pema_pb2.DecodePiece}.get(name)
        for piece in pieces if piece_type else []:
            problem = piece_type.FromString(piece).problem
            assert problem.status < 500, problem.detail

    understood_or_refused()
    assert answers(channel, name, good.SerializeToString())
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_stream_is_answered_up_to_what_is_no_message(channel: grpc.Channel) -> None:
    good = GOOD["Encode"].SerializeToString()
    raw: Any = channel
    stream = raw.stream_stream("/pema.v1.Plm/Encode")(iter([good, good, b"\xff", good]), timeout=WITHIN_S)
    for _ in range(2):
        assert pema_pb2.EncodePiece.FromString(next(stream)).rows.rows_B.shape == [2]
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    metadata: Any = caught.value.trailing_metadata()
    problem = json.loads(dict(metadata)[PROBLEM_METADATA])
    assert problem["hint"]


@pytest.mark.parametrize("path", ["grpc.health.v1.Health/Check", "pema.v1.Plm/Nothing", "nothing.at/All"])
def test_other_services_refuse_such_bytes_too(channel: grpc.Channel, path: str) -> None:
    raw: Any = channel
    with pytest.raises(grpc.RpcError) as caught:
        raw.unary_unary(f"/{path}")(b"\xff", timeout=WITHIN_S)
    assert caught.value.code() in REFUSALS

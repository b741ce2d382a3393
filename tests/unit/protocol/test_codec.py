"""Both forms of the messages, and what happens to bodies that are none."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from protocol.codec import Message
from protocol.errors import InvalidRequest, MalformedMessage
from protocol.messages import (
    DTYPES,
    DecodeRequest,
    DecodeResponse,
    DistributionRequest,
    EncodeRequest,
    EncodeResponse,
    HeadRequest,
    HeadRows,
    Limits,
    ModelCard,
)
from tests.profiles import scaled

token_id = st.integers(0, 2**31 - 1)
ragged = st.lists(st.lists(token_id, max_size=8), max_size=6)
dtypes = st.sampled_from(sorted(DTYPES))


def assert_same(ours: Message, theirs: Message, *, dtypes_too: bool = True) -> None:
    assert type(ours) is type(theirs)
    for name in type(ours).model_fields:
        left, right = getattr(ours, name), getattr(theirs, name)
        if isinstance(left, Tensor):
            assert left.shape == right.shape
            assert torch.equal(left.double(), right.double()), name
            assert left.dtype == right.dtype or not dtypes_too, name
        else:
            assert left == right, name


@st.composite
def answers(draw: st.DrawFn) -> DecodeResponse:
    rows = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    n, d = sum(rows), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    dtype = DTYPES[draw(dtypes)]
    scale = draw(st.sampled_from([1e-3, 1.0, 3e4]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).clamp(-2, 2) * scale

    def scales() -> Tensor | None:
        return normal(n).abs() if dtype == torch.int8 else None

    return DecodeResponse(
        digest=draw(st.text(max_size=10)),
        echo=draw(st.lists(st.integers(0, 2**32 - 1), min_size=len(rows), max_size=len(rows))),
        rows_B=torch.tensor(rows),
        cr_N_D=normal(n, d).to(dtype),
        logsumexp_N=normal(n),
        top1_N=torch.randint(0, 2**31 - 1, (n,), generator=generator),
        top1_logprob_N=normal(n),
        last_hidden_N_D=normal(n, d).to(dtype) if draw(st.booleans()) else None,
        cr_scale_N=scales(),
        last_hidden_scale_N=scales(),
    )


@given(ids=ragged, echo=st.none() | st.lists(st.integers(0, 2**32 - 1)), dtype=dtypes, flag=st.booleans())
def test_requests_round_trip_in_both_forms(ids: list[list[int]], echo: Any, dtype: Any, flag: bool) -> None:
    encode = EncodeRequest(token_ids=ids, from_position=[0] * len(ids), echo=echo, dtype=dtype, with_logsumexp=flag)
    decode = DecodeRequest(token_ids=ids, look_ahead=[3] * len(ids), stop_token_ids=[1, 2], echo=echo, dtype=dtype)
    for message in (encode, decode):
        assert_same(type(message).from_bytes(message.to_bytes()), message)
        assert_same(type(message).from_json(message.to_json()), message)


@given(
    text=st.none() | st.text(max_size=20),
    ids=st.none() | st.lists(token_id, max_size=5),
    top_k=st.integers(0, 2**40),
)
def test_a_distribution_request_round_trips(text: str | None, ids: list[int] | None, top_k: int) -> None:
    message = DistributionRequest(text=text, token_ids=ids, top_k=top_k)
    assert_same(DistributionRequest.from_bytes(message.to_bytes()), message)
    assert_same(DistributionRequest.from_json(message.to_json()), message)


@given(message=answers())
def test_answers_round_trip_bit_by_bit_and_both_forms_agree(message: DecodeResponse) -> None:
    binary = DecodeResponse.from_bytes(message.to_bytes())
    assert_same(binary, message)
    assert_same(DecodeResponse.from_json(message.to_json()), binary, dtypes_too=False)


@given(message=answers(), where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_garbled_answer_is_noticed(message: DecodeResponse, where: float, flip: int) -> None:
    data = bytearray(message.to_bytes())
    data[int(where * len(data))] ^= flip
    try:
        read = DecodeResponse.from_bytes(bytes(data))
    except InvalidRequest:
        return
    # A space of the header's padding, or a letter's case in a number such as 1e5: the same message.
    assert_same(read, message)


def test_nested_messages_round_trip() -> None:
    limits = Limits(
        max_sequence_tokens=1, max_sequences=2, max_head_rows=3, max_look_ahead=4, max_rows=6, max_body_bytes=5
    )
    card = ModelCard(
        name="ü",
        digest="a" * 64,
        tokenizer_digest="b" * 64,
        cr_kind="ffn_output",
        hidden_size=6,
        vocab_size=7,
        dtype="float32",
        head_dtype="bfloat16",
        head_digest="c" * 64,
        head_policy="full",
        eos_token_ids=[1],
        limits=limits,
    )
    assert ModelCard.from_json(card.to_json()) == card
    for digest in ("", "/etc", "../..", "A" * 64, "a" * 64 + "\n"):
        with pytest.raises(InvalidRequest, match="head_digest"):
            ModelCard.from_json(card.model_copy(update={"head_digest": digest}).to_json())
    assert ModelCard.from_bytes(card.to_bytes()) == card


def test_the_binary_form_is_the_documented_one() -> None:
    """A client in another language goes by this: int32 values and lengths, raw little-endian rows, JSON metadata."""
    message = EncodeRequest(token_ids=[[1, 2], [], [258]], from_position=[0, 0, 0], dtype="bfloat16")
    data = message.to_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    assert header["token_ids.values"]["dtype"] == header["token_ids.lengths"]["dtype"] == "I32"
    start, end = header["token_ids.values"]["data_offsets"]
    assert data[8 + size + start : 8 + size + end] == bytes([1, 0, 0, 0, 2, 0, 0, 0, 2, 1, 0, 0])
    assert json.loads(header["__metadata__"]["message"])["dtype"] == "bfloat16"
    assert "token_ids" not in json.loads(header["__metadata__"]["message"])


def container(tensors: dict[str, Tensor], message: Any = None, **metadata: str) -> bytes:
    if message is not None:
        metadata["message"] = json.dumps(message)
    return bytes(safetensors.torch.save(tensors, metadata=metadata or None))


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def ids(values: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    return {"token_ids.values": values, "token_ids.lengths": lengths}


FINE = {"from_position": [0]}
BAD_CONTAINERS = {
    "empty": b"",
    "short": b"\x05\0\0",
    "only a length": struct.pack("<Q", 10),
    "a huge length": struct.pack("<Q", 2**63) + b"{}",
    "text": b"hello, this is no container at all",
    "json": b'{"token_ids": [[1]], "from_position": [0]}',
    "header not json": raw(b"{nope"),
    "header a list": raw([1]),
    "header not unicode": raw(b"\xff\xfe{}"),
    "metadata null": raw({"__metadata__": None}),
    "metadata not strings": raw({"__metadata__": {"message": 3}}),
    "metadata a list": raw({"__metadata__": [1]}),
    "metadata twice": raw(b'{"__metadata__": {"message": "{}"}, "__metadata__": {"message": "[]"}}'),
    "message not json": safetensors.torch.save({}, metadata={"message": "hello"}),
    "offsets beyond the end": raw({"token_ids.values": {"dtype": "I32", "shape": [4], "data_offsets": [0, 16]}}),
    "shape is not the size": raw(
        {"token_ids.values": {"dtype": "I32", "shape": [9], "data_offsets": [0, 4]}}, b"\1\0\0\0"
    ),
    "unknown dtype": raw({"token_ids.values": {"dtype": "X1", "shape": [4], "data_offsets": [0, 4]}}, b"\1\0\0\0"),
    "dtype that torch may not have": raw(
        {"token_ids.values": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}, b"\1\0\0\0"
    ),
    "four-bit floats": raw({"token_ids.values": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}, b"\1\0\0\0"),
    "shape overflows": raw(
        {"token_ids.values": {"dtype": "I32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"\1\0\0\0"
    ),
    "message a list": container({}, message=[1, 2]),
    "message nested too deeply": safetensors.torch.save({}, metadata={"message": "[" * 100_000}),
    "message cut": safetensors.torch.save({}, metadata={"message": '{"from_position": ['}),
    "no lengths": container({"token_ids.values": int32(1)}, FINE),
    "no values": container({"token_ids.lengths": int32(1)}, FINE),
    "lengths too long": container(ids(int32(1), int32(2)), FINE),
    "lengths too short": container(ids(int32(1, 2), int32(1)), FINE),
    "negative lengths": container(ids(int32(1), int32(2, -1)), FINE),
    "int64 ids": container(ids(torch.tensor([1]), int32(1)), FINE),
    "float ids": container(ids(torch.tensor([1.0]), int32(1)), FINE),
    "ids of two dimensions": container(ids(int32(1)[None], int32(1)), FINE),
    "negative ids": container(ids(int32(-1), int32(1)), FINE),
    "a field missing": container(ids(int32(1), int32(1)), {}),
    "a tensor for a plain field": container(ids(int32(1), int32(1)) | {"dtype": int32(0)}, FINE),
    "an unknown tensor": container(ids(int32(1), int32(1)) | {"extra": int32(0)}, FINE),
    "an unknown field": container(ids(int32(1), int32(1)), FINE | {"form_position": [0]}),
    "not finite position": safetensors.torch.save(
        ids(int32(1), int32(1)), metadata={"message": '{"from_position": [NaN]}'}
    ),
}


@pytest.mark.parametrize("name", BAD_CONTAINERS)
def test_a_bad_container_is_the_callers_error(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        EncodeRequest.from_bytes(BAD_CONTAINERS[name])
    assert caught.value.hint


BAD_JSON = {
    "empty": b"",
    "not json": b"{'token_ids': 1}",
    "not unicode": b"\xff\xfe\xfa",
    "cut": b'{"token_ids": [[1',
    "nested too deeply": b"[" * 100_000,
    "a list": b"[]",
    "null": b"null",
    "a number of many digits": b'{"token_ids": [[' + b"9" * 5000 + b"]]}",
    "a field missing": b'{"token_ids": [[1]]}',
    "an unknown field": b'{"token_ids": [[1]], "from_position": [0], "form": 1}',
    "text for ids": b'{"token_ids": "hello", "from_position": [0]}',
    "ids as text": b'{"token_ids": [["1"]], "from_position": [0]}',
    "ids as floats": b'{"token_ids": [[1.0]], "from_position": [0]}',
    "ids as booleans": b'{"token_ids": [[true]], "from_position": [0]}',
    "negative ids": b'{"token_ids": [[-1]], "from_position": [0]}',
    "ids over int32": b'{"token_ids": [[2147483648]], "from_position": [0]}',
    "flat ids": b'{"token_ids": [1], "from_position": [0]}',
    "null ids": b'{"token_ids": [[null]], "from_position": [0]}',
    "infinite position": b'{"token_ids": [[1]], "from_position": [Infinity]}',
    "unknown dtype": b'{"token_ids": [[1]], "from_position": [0], "dtype": "int4"}',
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_the_callers_error(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        EncodeRequest.from_json(BAD_JSON[name])
    assert caught.value.hint


def test_a_lone_surrogate_is_no_text() -> None:
    with pytest.raises(InvalidRequest):
        DistributionRequest.from_json(b'{"text": "\\ud800"}')


EXAMPLE = EncodeRequest(token_ids=[[1, 2, 3], [4]], from_position=[0, 0], echo=[1, 2], dtype="float32")
ANSWER = HeadRows(digest="d", vocab_size=9, weight_N_D=torch.ones(3, 2), bias_N=torch.ones(3))


def parse(message_type: type[Message], data: bytes, binary: bool) -> None:
    """Either it is understood, or it is refused with an error of ours."""
    try:
        message = message_type.from_bytes(data) if binary else message_type.from_json(data)
    except InvalidRequest:
        return
    assert isinstance(message, message_type)


@pytest.mark.parametrize("message", [EXAMPLE, ANSWER], ids=["request", "answer"])
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_every_truncation_is_refused(message: Message, binary: bool) -> None:
    data = message.to_bytes() if binary else message.to_json()
    for end in range(len(data)):
        with pytest.raises(MalformedMessage):
            type(message).from_bytes(data[:end]) if binary else type(message).from_json(data[:end])


@pytest.mark.parametrize("message", [EXAMPLE, ANSWER], ids=["request", "answer"])
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_no_flipped_bit_gives_another_kind_of_error(message: Message, binary: bool) -> None:
    data = message.to_bytes() if binary else message.to_json()
    for place in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            parse(type(message), bytes(flipped), binary)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@pytest.mark.parametrize(
    "message_type",
    [EncodeRequest, DecodeRequest, HeadRequest, DistributionRequest, EncodeResponse, DecodeResponse, HeadRows],
)
@settings(max_examples=scaled(150))
@given(data=st.data())
def test_any_json_value_in_any_field_is_understood_or_refused(message_type: type[Message], data: st.DataObject) -> None:
    names = st.sampled_from(sorted(message_type.model_fields))
    fields = data.draw(st.dictionaries(names, json_values, max_size=8))
    parse(message_type, json.dumps(fields).encode(), binary=False)
    text = json.dumps(fields)
    parse(message_type, safetensors.torch.save({}, metadata={"message": text}), binary=True)


@settings(max_examples=scaled(300))
@given(data=st.binary(max_size=200))
def test_any_bytes_are_understood_or_refused(data: bytes) -> None:
    for body in (data, struct.pack("<Q", len(data)) + data, raw(b'{"__metadata__":' + data + b"}")):
        parse(EncodeRequest, body, binary=True)
        parse(EncodeRequest, body, binary=False)


def test_numbers_that_no_tensor_holds_are_refused() -> None:
    fields = {"digest": "d", "vocab_size": 9}
    weights: list[Any] = [[[10**400]], [[1, 2], [3]], [["a"]], [[None]], [[{}]], [[[[]]], 1]]
    for weight in weights:
        with pytest.raises(InvalidRequest):
            HeadRows.from_json(json.dumps(fields | {"weight_N_D": weight}).encode())


@pytest.mark.parametrize(
    "weight", [torch.ones(3), torch.ones(1, 2, 3), torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2) > 0]
)
def test_a_matrix_must_be_a_float_matrix(weight: Tensor) -> None:
    """Documented of the type: a client must not find out by an exception deep in its arithmetic."""
    with pytest.raises(InvalidRequest, match="weight_N_D"):
        HeadRows.from_bytes(container({"weight_N_D": weight}, {"digest": "d", "vocab_size": 9}))


def test_errors_name_the_place_and_not_the_value() -> None:
    cases: list[tuple[type[Message], dict[str, Any], str]] = [
        (EncodeRequest, {"token_ids": [[1, "SECRET"]], "from_position": [0]}, "token_ids.0.1"),
        (EncodeRequest, {"token_ids": [[1, -987654]], "from_position": [0]}, "token_ids.0.1"),
        (EncodeRequest, {"token_ids": "SECRET", "from_position": [0]}, "token_ids"),
        (EncodeRequest, {"token_ids": [[1]], "from_position": ["SECRET"]}, "from_position.0"),
        (EncodeRequest, {"token_ids": [[1]], "from_position": [0], "dtype": "SECRET"}, "dtype"),
        (DistributionRequest, {"text": ["SECRET", 987654]}, "text"),
        (DistributionRequest, {"text": "SECRET", "top_k": -1}, "top_k"),
        (HeadRows, {"digest": "d", "vocab_size": 1, "weight_N_D": [["SECRET"], 987654]}, "weight_N_D"),
    ]
    for message_type, fields, place in cases:
        for data, form in ((json.dumps(fields).encode(), "json"), (container({}, fields), "binary")):
            with pytest.raises(InvalidRequest, match=place) as caught:
                message_type.from_json(data) if form == "json" else message_type.from_bytes(data)
            assert "SECRET" not in repr(caught.value) + str(caught.value)
            assert "987654" not in repr(caught.value) + str(caught.value)


def test_unknown_fields_are_named_so_that_a_typo_is_found() -> None:
    with pytest.raises(InvalidRequest, match="look_a_head"):
        DecodeRequest.from_json(b'{"token_ids": [[1]], "look_ahead": [0], "look_a_head": 1}')

"""Features of gRPC alone: streams with several calls, chunks, health, reflection, status codes, generated code."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from data_owner_client.plm.connection.grpc import GrpcConnection
from harness.tcp_proxy import Pump, pump, tcp_proxy
from harness.tiny_models import TinyModels
from plm_owner_server.engines.interface import EncodeBatch, Encoded
from plm_owner_server.engines.transformers.engine import TransformersEngine
from plm_owner_server.operations.serving_state import ServingState
from plm_owner_server.service.plm_service import PlmService
from protocol import errors, messages, pema_pb2, pema_pb2_grpc
from protocol.chunks import join_head, join_rows, split_head, split_rows
from protocol.codec import Message
from protocol.integrity import token_crc32s
from protocol.messages import DecodeRequest, EncodeRequest, EncodeResponse, HeadRequest, HeadRows
from protocol.protobuf import from_proto, to_proto
from tests import guard
from tests.support import make_service, random_ids, serve_over_grpc, serve_state_over_grpc, until

ROOT = Path(__file__).parents[2]
SECRET = "GEHEIM"
FINE = EncodeRequest(token_ids=[[7, 5, 6]], from_position=[0])


@contextmanager
def counted_connections(url: str) -> Iterator[tuple[str, list[None]]]:
    """A proxy before a server on this machine: its URL, and a list with an item for each connection."""
    opened: list[None] = []

    def pumps() -> tuple[Pump, Pump]:
        opened.append(None)
        return pump, pump

    with tcp_proxy("127.0.0.1", int(url.rpartition(":")[2]), pumps) as port:
        yield guard.url("grpc", port), opened


def test_a_client_leaves_a_connection_that_is_old(tiny_service: PlmService) -> None:
    with (
        serve_over_grpc(tiny_service, connection_age_s=0.2) as url,
        counted_connections(url) as (proxied, opened),
        closing(guard.connection(proxied, retry_for=0)) as connection,
    ):
        until(lambda: bool(connection.encode(FINE)) and len(opened) > 2, within_s=60)  # and no call fails


def test_a_client_leaves_the_connection_to_a_server_that_stops(tiny_service: PlmService) -> None:
    state = ServingState(tiny_service)
    with (
        serve_state_over_grpc(state, guard.access()) as url,
        counted_connections(url) as (proxied, opened),
        closing(guard.connection(proxied, retry_for=0)) as connection,
    ):
        connection.encode(FINE)
        connection.encode(FINE)
        assert len(opened) == 1
        state.stop()
        with pytest.raises(errors.NotReady):
            connection.encode(FINE)
        with pytest.raises(errors.NotReady):  # the next attempt, as a load balancer would see it
            connection.encode(FINE)
        assert len(opened) == 2


@pytest.fixture(scope="module")
def channel(tiny_service: PlmService) -> Iterator[grpc.Channel]:
    with (
        serve_over_grpc(tiny_service) as url,
        guard.channel(url) as channel,
    ):
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> pema_pb2_grpc.PlmStub:
    return pema_pb2_grpc.PlmStub(channel)  # type: ignore[no-untyped-call]


def encode_call(request_id: str, ids: list[list[int]], **fields: Any) -> Any:
    request = EncodeRequest(token_ids=ids, from_position=[0] * len(ids), **fields)
    return pema_pb2.EncodeCall(request_id=request_id, request=to_proto(request, pema_pb2.EncodeRequest()))


def test_a_stream_answers_every_call_and_a_bad_one_spoils_no_other(stub: Any, tiny_service: PlmService) -> None:
    texts = [random_ids(i, [5 + i, 3]) for i in range(12)]
    calls = [encode_call(f"call-{i}", ids, dtype="float32") for i, ids in enumerate(texts)]
    calls.insert(5, encode_call("bad", [[5], []]))
    parts: dict[str, list[Any]] = {}
    for piece in stub.Encode(iter(calls)):
        parts.setdefault(piece.request_id, []).append(piece)
    assert all(pieces[-1].last and not any(p.last for p in pieces[:-1]) for pieces in parts.values())
    (bad,) = parts.pop("bad")
    assert bad.problem.type == "urn:pema:error:invalid-request"
    assert bad.problem.status == 400
    assert bad.problem.request_id == "bad"
    assert bad.problem.hint
    assert len(parts) == len(texts)
    for i, ids in enumerate(texts):
        answer = join_rows([from_proto(piece.rows, EncodeResponse) for piece in parts[f"call-{i}"]])
        assert answer.echo == token_crc32s(ids)
        expected = tiny_service.encode(
            EncodeRequest(token_ids=ids, from_position=[0, 0], dtype="float32"), guard.caller()
        )
        assert answer.to_bytes() == expected.to_bytes()


def test_large_answers_come_in_pieces_and_are_put_together(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Known states would change the last bits from one call to the next.
    service = make_service(tiny_models["llama"], prefix_cache_mib=0)
    pieces: list[int] = []

    def small(response: Any) -> Iterator[Any]:
        parts = list(split_rows(response, 500))
        pieces.append(len(parts))
        yield from parts

    monkeypatch.setattr("plm_owner_server.transports.grpc_server.split_rows", small)
    monkeypatch.setattr("plm_owner_server.transports.grpc_server.split_head", lambda rows: split_head(rows, 1000))
    monkeypatch.setattr("plm_owner_server.transports.grpc_server.CHUNK_BYTES", 100)
    ids = random_ids(3, [40, 3, 17, 60, 1, 1])
    with serve_over_grpc(service) as url:
        connection = guard.connection(url)
        encode = EncodeRequest(token_ids=ids, from_position=[0, 1, 2, 3, 0, 0], with_logsumexp=True)
        decode = DecodeRequest(token_ids=ids, look_ahead=[3, 0, 9, 1, 2, 0])
        head = HeadRequest(token_ids=[3, 1, 4, 1, 5] * 30)
        assert connection.encode(encode).to_bytes() == service.encode(encode, guard.caller()).to_bytes()
        assert connection.decode(decode).to_bytes() == service.decode(decode, guard.caller()).to_bytes()
        assert connection.lm_head(head).to_bytes() == service.lm_head(head, guard.caller()).to_bytes()
        assert connection.tokenizer() == service.tokenizer()
        connection.close()
    assert min(pieces) > 1


@given(rows=st.lists(st.integers(1, 9), min_size=1, max_size=12), size=st.integers(1, 400), logsumexp=st.booleans())
def test_pieces_are_whole_sequences_that_fit_and_lose_nothing(rows: list[int], size: int, logsumexp: bool) -> None:
    n = sum(rows)
    answer = EncodeResponse(
        digest="d",
        echo=list(range(len(rows))),
        rows_B=torch.tensor(rows),
        cr_N_D=torch.arange(4.0 * n).view(n, 4),
        logsumexp_N=torch.arange(1.0 * n) if logsumexp else None,
    )
    pieces = list(split_rows(answer, size))
    row_bytes = 4 * (5 if logsumexp else 4)
    assert all(len(piece.rows_B) == 1 or len(piece.cr_N_D) * row_bytes <= size for piece in pieces)
    assert all(len(piece.cr_N_D) == int(piece.rows_B.sum()) for piece in pieces)
    assert join_rows(pieces).to_bytes() == answer.to_bytes()


@given(rows=st.integers(1, 30), size=st.integers(1, 200), bias=st.booleans())
def test_head_pieces_lose_nothing(rows: int, size: int, bias: bool) -> None:
    weight_N_D = torch.arange(3.0 * rows).view(rows, 3)
    head = HeadRows(digest="d", vocab_size=99, weight_N_D=weight_N_D, bias_N=weight_N_D[:, 0].clone() if bias else None)
    assert join_head(list(split_head(head, size))).to_bytes() == head.to_bytes()


def test_pieces_of_different_answers_are_not_joined(tiny_service: PlmService) -> None:
    ids = random_ids(4, [4])
    plain = tiny_service.encode(EncodeRequest(token_ids=ids, from_position=[0]))
    more = tiny_service.encode(EncodeRequest(token_ids=ids, from_position=[0], with_logsumexp=True))
    for other in (more, plain.model_copy(update={"digest": "another"})):
        with pytest.raises(errors.ProtocolViolation):
            join_rows([plain, other])


def test_health_and_reflection(channel: grpc.Channel) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    for name in ("", "pema.v1.Plm"):
        deadline = time.monotonic() + 30
        while (status := health.Check(health_pb2.HealthCheckRequest(service=name)).status) != 1:
            assert time.monotonic() < deadline, status
    database = ProtoReflectionDescriptorDatabase(channel)
    assert "pema.v1.Plm" in database.get_services()


def test_before_the_model_is_loaded_every_call_is_unavailable() -> None:
    with serve_over_grpc(None) as url, guard.channel(url) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        stub = pema_pb2_grpc.PlmStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetModelCard(pema_pb2.GetModelCardRequest())
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        (piece,) = stub.Encode(iter([encode_call("early", [[5]])]))
        assert piece.problem.status == 503
        assert piece.problem.retry_after_s == 2.0


def test_a_request_over_the_limit_is_refused_as_such(tiny_service: PlmService) -> None:
    with serve_over_grpc(tiny_service, max_body_bytes=4096) as url:
        connection = guard.connection(url)
        with pytest.raises(errors.PayloadTooLarge):
            connection.encode(EncodeRequest(token_ids=[[5] * 4000], from_position=[0]))
        assert len(connection.encode(EncodeRequest(token_ids=[[5]], from_position=[0])).cr_N_D) == 1
        connection.close()


@pytest.mark.parametrize("damaged", ["values", "lengths", "dtype"])
def test_damaged_bytes_are_a_mistake_of_the_client(stub: Any, damaged: str) -> None:
    call = encode_call("x", [[5, 6]])
    if damaged == "dtype":
        call.request.dtype = "int4"
    else:
        setattr(call.request.token_ids, damaged, b"\1\2\3")
    (piece,) = stub.Encode(iter([call]))
    assert piece.problem.status == 400


class _Failing:
    """Fails with an error whose text quotes the request."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.info, self.head, self.drafting = engine.info, engine.head, engine.drafting

    def warm_up(self) -> None: ...

    def encode(self, batch: EncodeBatch) -> Encoded:
        raise RuntimeError(f"no luck with {SECRET} {batch.token_ids}")


def test_a_fault_of_the_server_quotes_nothing(tiny_models: TinyModels, caplog: pytest.LogCaptureFixture) -> None:
    with serve_over_grpc(make_service(tiny_models["llama"], wrap=_Failing)) as url:
        connection = guard.connection(url)
        with pytest.raises(errors.ServerFault) as caught:
            connection.encode(EncodeRequest(token_ids=[[201, 202]], from_position=[0]))
        connection.close()
    assert caught.value.request_id
    assert SECRET not in str(caught.value) + caplog.text
    assert f"{caught.value.request_id}: RuntimeError in encode" in caplog.text


def test_a_server_that_is_not_there_is_said_at_once() -> None:
    connection = GrpcConnection("grpc://127.0.0.1:1")
    with pytest.raises(errors.ConnectionFailed, match="grpc://127"):
        connection.model_card()
    connection.close()


MIRRORED = ["ModelCard", "Limits", "HeadRequest", "HeadRows", "EncodeRequest", "EncodeResponse", "DecodeRequest"]
MIRRORED += ["DecodeResponse", "DistributionRequest", "DistributionResponse"]


@pytest.mark.parametrize("name", MIRRORED)
def test_protobuf_mirrors_the_messages(name: str) -> None:
    ours: type[Message] = getattr(messages, name)
    assert [field.name for field in pema_pb2.DESCRIPTOR.message_types_by_name[name].fields] == list(ours.model_fields)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 2)])
def test_tensors_travel_unchanged(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight: Tensor = torch.randn(shape).to(dtype)
    rows = HeadRows(digest="d", vocab_size=9, weight_N_D=weight, softcap=3.0)
    back = from_proto(to_proto(rows, pema_pb2.HeadRows()), HeadRows)
    assert back.weight_N_D.dtype == dtype
    assert torch.equal(back.weight_N_D, weight)
    assert back.softcap == 3.0


def test_a_garbled_tensor_is_noticed() -> None:
    rows = to_proto(HeadRows(digest="d", vocab_size=9, weight_N_D=torch.ones(2, 3)), pema_pb2.HeadRows())
    rows.weight_N_D.data = b"\1" + rows.weight_N_D.data[1:]
    with pytest.raises(errors.MalformedMessage, match="checksum"):
        from_proto(rows, HeadRows)


def test_the_generated_code_is_not_stale(tmp_path: Path) -> None:
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, "protocol/pema.proto"]
    subprocess.run(command, cwd=ROOT, check=True)
    for fresh in (tmp_path / "protocol").iterdir():
        assert fresh.read_text() == (ROOT / "protocol" / fresh.name).read_text(), "run: make proto"

"""The whole LM head in chunks: resumed, checked, known by its digest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_owner_client.plm import head_cache
from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.plm.remote_plm import RemotePlm
from harness.tiny_models import VOCAB_SIZE, TinyModels, build_model
from plm_owner_server.engines.transformers.engine import TransformersEngine
from protocol.errors import ConnectionFailed, InvalidData, ProtocolViolation
from protocol.messages import HeadRequest, HeadRows
from tests.support import make_service

CHUNK = 100  # rows


class Recorded(InProcessConnection):
    """Counts the requests for head rows, and breaks or changes the answers as told."""

    def __init__(self, service: Any) -> None:
        super().__init__(service)
        self.asked: list[HeadRequest] = []
        self.fail_at = -1
        self.change = 0.0
        self._service = service
        self.lm_head = self._lm_head

    def _lm_head(self, request: HeadRequest) -> HeadRows:
        self.asked.append(request)
        if len(self.asked) == self.fail_at:
            raise ConnectionFailed("cut")
        rows: HeadRows = self._service.lm_head(request)
        return rows.model_copy(update={"weight_N_D": rows.weight_N_D + self.change})


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_cache, "_CHUNK_BYTES", CHUNK * 32 * 4)


@pytest.fixture(params=["llama", "phi"])  # phi's head has a bias
def connection(request: pytest.FixtureRequest, tiny_models: TinyModels) -> Recorded:
    return Recorded(make_service(tiny_models[request.param]))


def requests() -> int:
    return -(-VOCAB_SIZE // CHUNK)


def test_the_head_is_the_models_own_and_fetched_once(
    connection: Recorded, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    plm = RemotePlm(connection, cache=tmp_path)
    head = plm.full_head()
    truth = build_model(request.node.callspec.params["connection"]).get_output_embeddings()
    assert torch.equal(head.weight_V_D, truth.weight)
    assert (head.bias_V is None) == (truth.bias is None)
    assert head.bias_V is None or torch.equal(head.bias_V, truth.bias)
    assert len(connection.asked) == requests()
    assert torch.equal(RemotePlm(connection, cache=tmp_path).full_head().weight_V_D, truth.weight)
    assert len(connection.asked) == requests()
    assert plm.cached_head().complete


def test_without_a_cache_nothing_is_left(connection: Recorded) -> None:
    assert RemotePlm(connection, cache=None).full_head().weight_V_D.shape == (VOCAB_SIZE, 32)
    with pytest.raises(InvalidData, match="no cache"):
        RemotePlm(connection, cache=None).fetch_head()


def test_a_download_that_was_cut_goes_on(connection: Recorded, tmp_path: Path) -> None:
    plm = RemotePlm(connection, cache=tmp_path)
    connection.fail_at = 3
    with pytest.raises(ConnectionFailed):
        plm.fetch_head()
    assert plm.cached_head().rows == 2 * CHUNK
    assert not plm.cached_head().complete
    plm.fetch_head()
    assert [request.start for request in connection.asked[3:]] == list(range(2 * CHUNK, VOCAB_SIZE, CHUNK))
    assert plm.cached_head().complete


def test_rows_that_are_not_the_digests_are_thrown_away(connection: Recorded, tmp_path: Path) -> None:
    plm = RemotePlm(connection, cache=tmp_path)
    connection.change = 1.0
    with pytest.raises(ProtocolViolation, match="were deleted"):
        plm.full_head()
    assert plm.cached_head().rows == 0
    connection.change = 0.0
    assert plm.fetch_head().complete


def test_a_damaged_chunk_is_fetched_again(connection: Recorded, tmp_path: Path) -> None:
    plm = RemotePlm(connection, cache=tmp_path)
    path = sorted(plm.fetch_head().folder.glob("rows-*"))[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InvalidData, match="damaged"):
        plm.full_head()
    connection.asked.clear()
    plm.full_head()
    assert len(connection.asked) >= 1
    assert plm.cached_head().complete


def test_heads_of_two_models_do_not_mix(tiny_models: TinyModels, tmp_path: Path) -> None:
    plms = [
        RemotePlm(InProcessConnection(make_service(tiny_models[name])), cache=tmp_path) for name in ("llama", "qwen2")
    ]
    heads = [plm.full_head() for plm in plms]
    assert plms[0].card.head_digest != plms[1].card.head_digest
    assert all(plm.cached_head().complete for plm in plms)
    assert not torch.equal(heads[0].weight_V_D, heads[1].weight_V_D)


def test_half_precision_heads_travel_as_they_are(tiny_models: TinyModels, tmp_path: Path) -> None:
    def halved(engine: TransformersEngine) -> TransformersEngine:
        engine.head = engine.head.to(torch.bfloat16)
        return engine

    service = make_service(tiny_models["llama"], wrap=halved)
    plm = RemotePlm(InProcessConnection(service), cache=tmp_path)
    assert plm.card.head_dtype == "bfloat16"
    truth = build_model("llama").get_output_embeddings().weight
    assert torch.equal(plm.full_head().weight_V_D, truth.to(torch.bfloat16))

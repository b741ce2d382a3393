"""The adapter's network against its formula, and its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from data_owner_client.adapter.network import Adapter
from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.data.tasks import Task
from data_owner_client.plm.identity import ModelIdentity
from protocol.errors import InvalidData
from protocol.head import LMHead
from tests.adapters import adapter_card

D, C = 12, 7
CANDIDATES = torch.arange(C) * 2


def test_a_residual_adapter_begins_as_the_plm() -> None:
    adapter = Adapter(D, 5, "residual", rms=2.0)
    cr_N_D = torch.randn(4, D)
    torch.testing.assert_close(adapter.hidden(adapter.scaled(cr_N_D)), cr_N_D)


def make_trained() -> TrainedAdapter:
    model = ModelIdentity(name="m", digest="d" * 64, cr_kind="last_hidden_state", hidden_size=D, vocab_size=20)
    head = LMHead(torch.randn(C, D), torch.randn(C), 0.5, 30.0)
    card = adapter_card(model, head, task=Task(name="t"), rank=5, length_ratio=1.5, mean_length=9.0)
    adapter = Adapter(D, 5, "residual", rms=2.5, dropout=0.5)
    torch.nn.init.normal_(adapter.B_pd.weight)
    return TrainedAdapter(card, adapter, CANDIDATES, head)


def network_of(trained: TrainedAdapter) -> Adapter:
    assert isinstance(trained.adapter, Adapter)
    return trained.adapter


def test_an_adapter_survives_the_disk(tmp_path: Path) -> None:
    trained = make_trained()
    trained.save(tmp_path)
    loaded = TrainedAdapter.load(tmp_path)
    cr_N_D = torch.randn(6, D)
    assert loaded.card.model_copy(update={"tensors_sha256": ""}) == trained.card
    assert torch.equal(loaded.candidate_ids_C, CANDIDATES)
    assert torch.equal(loaded.logprobs(cr_N_D), trained.logprobs(cr_N_D))
    assert loaded.card.expected_length(10) == 15.0
    assert loaded.card.expected_length(0) == 1.0


def test_tensors_have_the_names_of_the_format_on_disk(tmp_path: Path) -> None:
    trained, adapter = make_trained(), Adapter(D, 5, "recent")
    torch.nn.init.constant_(adapter.mismatch_scale, 0.25)
    card = trained.card.model_copy(update={"form": "recent"})
    replace(trained, card=card, adapter=adapter).save(tmp_path)
    names = {"A.weight", "B_pd.weight", "B_rct.weight", "E.weight", "drifted", "head_rms", "rms"}
    tensors = safetensors.torch.load_file(tmp_path / "adapter.safetensors")
    assert tensors.keys() == names | {"candidate_ids_C", "head.weight", "head.bias"}
    assert network_of(TrainedAdapter.load(tmp_path)).mismatch_scale.item() == tensors["drifted"].item() == 0.25


def test_logprobs_are_a_distribution_through_the_whole_head() -> None:
    trained = make_trained()
    cr_D: Tensor = torch.randn(D)
    assert trained.head.bias_V is not None
    with torch.no_grad():
        network = network_of(trained)
        h_D = cr_D + network.B_pd.weight @ (network.A.weight @ cr_D)
    logits_C = 30 * torch.tanh(0.5 * (trained.head.weight_V_D @ h_D + trained.head.bias_V) / 30)
    torch.testing.assert_close(trained.logprobs(cr_D[None])[0], logits_C.log_softmax(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "damage", ["no json", "no tensors", "other json", "truncated", "other shapes", "of another training"]
)
def test_a_damaged_adapter_is_explained(tmp_path: Path, damage: str) -> None:
    trained = make_trained()
    trained.save(tmp_path)
    json_file, tensors = tmp_path / "adapter.json", tmp_path / "adapter.safetensors"
    if damage == "no json":
        json_file.unlink()
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "other json":
        json_file.write_text("{}")
    elif damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-9])
    elif damage == "other shapes":
        card = TrainedAdapter.load(tmp_path).card
        json_file.write_text(card.model_copy(update={"rank": 3}).model_dump_json())
    else:
        # What a kill between the two files of a second training leaves.
        before = json_file.read_bytes()
        make_trained().save(tmp_path)
        json_file.write_bytes(before)
    with pytest.raises(InvalidData, match="adapter") as caught:
        TrainedAdapter.load(tmp_path)
    assert "pema-client train" in caught.value.hint

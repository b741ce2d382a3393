"""Training against the formulas in float64, and the adapter's file."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_owner_client.adapter import Adapter, AdapterCard, TrainedAdapter
from data_owner_client.decoding.interpolation import Interpolation
from data_owner_client.memory import MemoryRows
from data_owner_client.memory.store import ModelIdentity
from data_owner_client.tasks import Task
from data_owner_client.training import (
    TrainingData,
    TrainingSettings,
    ValidationData,
    choose_interpolation,
    target_logprobs,
    train_adapter,
)
from protocol.errors import InvalidData, NumericalFault
from protocol.head import LMHead
from tests import reference

D, C, N = 12, 7, 90
SETTINGS = TrainingSettings(rank=5, epochs=3, reconstruction_epochs=2, batch_rows=32, dropout=0.0, patience=99)


def make_rows(seed: int, rows: int = N, examples: int = 9) -> MemoryRows:
    """Rows whose targets follow from their representations."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(C, D, generator=torch.Generator().manual_seed(1))
    cr_N_D = 3 * torch.randn(rows, D, generator=generator)
    return MemoryRows(
        cr_N_D=cr_N_D,
        target_N=((cr_N_D @ truth.T).argmax(-1) * 2).int(),
        rows_E=torch.full((examples,), rows // examples, dtype=torch.int32),
        source_tokens_E=torch.full((examples,), 6, dtype=torch.int32),
    )


CANDIDATES = torch.arange(C) * 2


def make_head() -> LMHead:
    return LMHead(torch.randn(C, D, generator=torch.Generator().manual_seed(2)))


def make_validation(plm_probability: float = 0.2) -> ValidationData:
    rows = make_rows(5)
    return ValidationData.of(rows, CANDIDATES, torch.full((N,), plm_probability).log().double(), length_ratio=1.5)


@pytest.mark.parametrize("form", ["paper", "residual"])
def test_both_phases_are_the_formulas(form: Any) -> None:
    settings = replace(SETTINGS, form=form)
    rows, head = make_rows(3), make_head()
    data = TrainingData.of(rows, CANDIDATES)
    trained = train_adapter(data, head, make_validation(), settings)
    assert trained.best_nll == trained.history[-1].validation_nll, "the last epoch is the best, so its weights are kept"

    rms = rows.cr_N_D.square().mean().sqrt().item()
    torch.manual_seed(settings.seed)
    initial = Adapter(D, settings.rank, form, rms=rms).state_dict()
    generator = torch.Generator().manual_seed(settings.seed)
    batches = [torch.randperm(N, generator=generator).split(settings.batch_rows) for _ in range(5)]
    steps = settings.epochs * math.ceil(N / settings.batch_rows)
    rates = [settings.learning_rate * (1 + math.cos(math.pi * i / steps)) / 2 for i in range(steps)]
    expected = reference.train(
        rows.cr_N_D,
        data.label_N,
        head.weight_V_D,
        initial,
        batches,
        form=form,
        rms=rms,
        kappa=settings.kappa,
        learning_rates=rates,
        reconstruction_epochs=settings.reconstruction_epochs,
    )
    for name, weight in expected.items():
        torch.testing.assert_close(trained.adapter.state_dict()[name].double(), weight, rtol=1e-3, atol=1e-5)
        assert (weight - initial[name]).abs().max() > 1e-4, f"{name} was trained"


def test_training_learns_and_is_repeatable() -> None:
    settings = replace(SETTINGS, rank=12, epochs=20, learning_rate=1e-2, dropout=0.1)
    data, head = TrainingData.of(make_rows(3, rows=900), CANDIDATES), make_head()
    validation = make_validation()
    first = train_adapter(data, head, validation, settings)
    again = train_adapter(data, head, validation, settings)
    other = train_adapter(data, head, validation, replace(settings, seed=1))
    assert first.best_nll < -math.log(0.2) - 0.3
    assert first.history == again.history
    assert all(torch.equal(a, b) for a, b in zip(first.adapter.parameters(), again.adapter.parameters(), strict=True))
    assert first.history != other.history
    reconstruction = [epoch.reconstruction_loss for epoch in first.history if epoch.phase == "reconstruction"]
    assert reconstruction[-1] < reconstruction[0]


def test_the_best_epoch_is_kept_and_patience_ends_training() -> None:
    settings = replace(SETTINGS, epochs=60, patience=2, learning_rate=0.1)
    data, head, validation = TrainingData.of(make_rows(3, rows=18), CANDIDATES), make_head(), make_validation()
    trained = train_adapter(data, head, validation, settings)
    nlls = [epoch.validation_nll for epoch in trained.history if epoch.validation_nll is not None]
    assert len(nlls) < 60
    assert trained.best_nll == min(nlls) == nlls[-3]
    _, kept = validation.best(target_logprobs(trained.adapter, head, validation.data), "constant")
    assert kept == trained.best_nll


def test_training_refuses_what_it_cannot_learn_from() -> None:
    rows = make_rows(3)
    empty = TrainingData(rows.cr_N_D[:0], torch.zeros(0, dtype=torch.long))
    with pytest.raises(InvalidData, match="no rows"):
        train_adapter(empty, make_head(), make_validation(), SETTINGS)
    broken = TrainingData(rows.cr_N_D * float("nan"), torch.zeros(N, dtype=torch.long))
    with pytest.raises(NumericalFault, match="not finite"):
        train_adapter(broken, make_head(), make_validation(), SETTINGS)


def test_targets_outside_the_candidates_have_probability_zero() -> None:
    rows = replace(make_rows(3), target_N=torch.arange(N, dtype=torch.int32))
    data = TrainingData.of(rows, CANDIDATES)
    assert data.label_N[:14].tolist() == [0, -1, 1, -1, 2, -1, 3, -1, 4, -1, 5, -1, 6, -1]
    adapter, head = Adapter(D, 4, "residual"), make_head()
    logprob_N = target_logprobs(adapter, head, data)
    expected = (rows.cr_N_D[:14:2] @ head.weight_V_D.T).log_softmax(-1).diagonal()
    torch.testing.assert_close(logprob_N[:14:2].float(), expected)
    assert logprob_N[1].item() == -math.inf


def test_mixture_likelihood_by_hand() -> None:
    validation = replace(make_validation(), position_N=torch.arange(N) % 3, horizon_N=torch.full((N,), 3.0).double())
    pema = torch.full((N,), 0.8).log().double()
    weights = [0.9, 0.36, 0.09]
    expected = -sum(math.log((1 - w) * 0.2 + w * 0.8) for w in weights) / 3
    assert validation.mixture_nll(pema, Interpolation(schedule="gradual", lambda_max=0.9)) == pytest.approx(expected)
    assert validation.mixture_nll(pema, Interpolation(schedule="none")) == pytest.approx(-math.log(0.2))


def test_the_chosen_interpolation_is_the_likeliest_of_the_grid() -> None:
    validation = make_validation()
    sure_late = torch.where(validation.position_N < 3, math.log(0.01), math.log(0.9)).double()
    best, by_schedule = choose_interpolation(validation, sure_late)
    assert best.schedule == "constant"
    assert set(by_schedule) == {"constant", "linear", "gradual"}
    sure_early = torch.where(validation.position_N < 3, math.log(0.9), -math.inf).double()
    best, by_schedule = choose_interpolation(validation, sure_early)
    assert best.schedule == "gradual"
    assert by_schedule["gradual"][1] == min(nll for _, nll in by_schedule.values())


def test_a_residual_adapter_begins_as_the_plm() -> None:
    adapter = Adapter(D, 5, "residual", rms=2.0)
    cr_N_D = torch.randn(4, D)
    torch.testing.assert_close(adapter.hidden(adapter.scaled(cr_N_D)), cr_N_D)


def make_trained() -> TrainedAdapter:
    model = ModelIdentity(name="m", digest="d" * 64, cr_kind="last_hidden_state", hidden_size=D, vocab_size=20)
    card = AdapterCard(
        model=model,
        task=Task(name="t"),
        context_mode="private",
        form="residual",
        rank=5,
        candidates=C,
        length_ratio=1.5,
        mean_length=9.0,
        interpolation=Interpolation(),
        interpolation_why="a test",
        logit_scale=0.5,
        softcap=30.0,
        settings={},
        validation={},
        memory_digest="e" * 64,
    )
    head = LMHead(torch.randn(C, D), torch.randn(C), card.logit_scale, card.softcap)
    adapter = Adapter(D, 5, "residual", rms=2.5, dropout=0.5)
    torch.nn.init.normal_(adapter.B_pd.weight)
    return TrainedAdapter(card, adapter, CANDIDATES, head)


def test_an_adapter_survives_the_disk(tmp_path: Path) -> None:
    trained = make_trained()
    trained.save(tmp_path)
    loaded = TrainedAdapter.load(tmp_path)
    cr_N_D = torch.randn(6, D)
    assert loaded.card.model_copy(update={"tensors_sha256": ""}) == trained.card
    assert torch.equal(loaded.candidate_ids_C, CANDIDATES)
    assert torch.equal(loaded.logprobs(cr_N_D), trained.logprobs(cr_N_D))
    assert loaded.horizon(10) == 15.0
    assert loaded.horizon(0) == 1.0


def test_logprobs_are_a_distribution_through_the_whole_head() -> None:
    trained = make_trained()
    cr_D: Tensor = torch.randn(D)
    with torch.no_grad():
        h_D = cr_D + trained.adapter.B_pd.weight @ (trained.adapter.A.weight @ cr_D)
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

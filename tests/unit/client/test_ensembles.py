"""Averages of adapters: their distribution, their file, and which trainings become members."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from data_owner_client.adapter.card import AdapterCard, MemberCard
from data_owner_client.adapter.ensemble import Ensemble, mean_logprob
from data_owner_client.adapter.network import Adapter
from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.data.tasks import Task
from data_owner_client.plm.identity import ModelIdentity
from data_owner_client.training.batches import Batch
from data_owner_client.training.member_selection import likeliest_weights, network_of, select_members
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.trainer import Trained
from data_owner_client.training.validation import ValidationData, target_logprobs
from protocol.errors import InvalidData
from protocol.head import LMHead
from tests.adapters import adapter_card

D, C, N = 12, 7, 40
CANDIDATES = torch.arange(C) * 2
MODEL = ModelIdentity(name="m", digest="d" * 64, cr_kind="last_hidden_state", hidden_size=D, vocab_size=20)
WEIGHTS = (0.5, 0.3, 0.2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def network(form: Any = "residual", rank: int = 5) -> Adapter:
    adapter = Adapter(D, rank, form, rms=1.5)
    for weight in adapter.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return adapter.eval()


def head() -> LMHead:
    return LMHead(torch.randn(C, D), torch.randn(C), 0.5, 30.0)


def make_ensemble() -> TrainedAdapter:
    """An average of networks of all forms and of several ranks."""
    members = [network("residual", 5), network("recent", 3), network("paper", 8)]
    rows, settings = head(), {"seed": 1}
    cards = tuple(
        MemberCard(form=member.form, rank=member.rank, weight=weight, settings=settings)
        for member, weight in zip(members, WEIGHTS, strict=True)
    )
    card = adapter_card(MODEL, rows, task=Task(name="t"), rank=5, members=cards)
    return TrainedAdapter(card, Ensemble(members, WEIGHTS), CANDIDATES, rows)


def test_the_distribution_is_the_average_of_the_members(tmp_path: Path) -> None:
    trained, cr_N_D = make_ensemble(), torch.randn(6, D)
    previous_N_P = CANDIDATES[torch.randint(C, (6, 2))]
    expected_N_C = torch.zeros(6, C, dtype=torch.float64)
    assert isinstance(trained.adapter, Ensemble)
    for member, weight in zip(trained.adapter.adapters, WEIGHTS, strict=True):
        alone = replace(trained, adapter=member)
        expected_N_C += weight * alone.logprobs(cr_N_D, previous_N_P).double().exp()
    torch.testing.assert_close(trained.logprobs(cr_N_D, previous_N_P).double().exp(), expected_N_C)

    trained.save(tmp_path)
    loaded = TrainedAdapter.load(tmp_path)
    assert torch.equal(loaded.logprobs(cr_N_D, previous_N_P), trained.logprobs(cr_N_D, previous_N_P))
    assert loaded.card.members == trained.card.members
    assert loaded.card.sees_recent_tokens


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 4},
        {"form": "paper"},
        {"members": [{"form": "residual", "rank": 5, "weight": 0.5, "settings": {}}]},
        {"members": [{"form": "residual", "rank": 5, "weight": 0.0, "settings": {}}]},
        {"members": [{"form": "residual", "rank": 5, "weight": 1 / 65, "settings": {}}] * 65},
    ],
)
def test_a_card_whose_members_do_not_fit_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AdapterCard.model_validate(make_ensemble().card.model_dump() | change)


@pytest.mark.parametrize("member", [{"rank": 10**9}, {"form": "recent"}])
def test_a_member_of_another_size_is_refused(tmp_path: Path, member: dict[str, Any]) -> None:
    trained = make_ensemble()
    *others, last = trained.card.members
    members = (*others, last.model_copy(update=member))
    replace(trained, card=trained.card.model_copy(update={"members": members})).save(tmp_path)
    with pytest.raises(InvalidData, match="damaged"):
        TrainedAdapter.load(tmp_path)


def held_out(label_N: Tensor, cr_N_D: Tensor) -> ValidationData:
    """Rows at whose positions the PLM gives each token a tenth."""
    count = len(label_N)
    data = Batch(cr_N_D, label_N, torch.full((count, 2), -1), torch.ones(count, dtype=torch.bool))
    plm_logprob_N = torch.full((count,), 0.1, dtype=torch.float64).log()
    return ValidationData(data, plm_logprob_N, torch.zeros(count, dtype=torch.int64), torch.ones(count))


def test_networks_that_complete_each_other_become_members() -> None:
    """Each half of the rows is foretold by another network; a third one says nothing."""
    rows, cr_N_D = head(), torch.randn(N, D)
    first, second, noise = network(), network(), network(rank=3)
    none_N_2 = torch.full((N, 2), -1)
    of_first_N, of_second_N = (each.logprobs(rows, cr_N_D, none_N_2).argmax(-1) for each in (first, second))
    label_N = torch.where(torch.arange(N) < N // 2, of_first_N, of_second_N)
    validation = held_out(label_N, cr_N_D)
    networks = [noise, first, second]
    alone = [validation.best(target_logprobs(each, rows, validation.data), "constant")[1] for each in networks]
    trainings = sorted(
        (Trained(TrainingSettings(seed=seed), network, [], alone[seed]) for seed, network in enumerate(networks)),
        key=lambda trained: trained.best_nll,
    )

    members = select_members(trainings, 4, validation, rows)
    assert {member.trained.settings.seed for member in members if member.weight > 0.2} == {1, 2}
    assert sum(member.weight for member in members) == pytest.approx(1.0)
    assert [member.weight for member in members] == sorted((member.weight for member in members), reverse=True)
    averaged = validation.best(target_logprobs(network_of(members), rows, validation.data), "constant")[1]
    assert averaged < min(alone)

    [single] = select_members(trainings, 1, validation, rows)
    assert single.trained.settings.seed == min(range(3), key=lambda number: alone[number])
    assert network_of([single]) is single.trained.adapter


@pytest.mark.parametrize("seed", range(5))
def test_no_other_weights_are_likelier(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logprob_K_N = torch.randn(4, 200, generator=generator, dtype=torch.float64).log_softmax(dim=0) - 1
    logprob_K_N[3, :20] = -torch.inf
    plm_N = torch.full((200,), -4.0, dtype=torch.float64)
    weight_K = likeliest_weights(logprob_K_N, plm_N)

    def best(weight_K: Tensor) -> float:
        """Likelihood of the average beside the PLM with its best λ."""
        average_N = (weight_K.log()[:, None] + logprob_K_N).logsumexp(dim=0)
        shares = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
        return max(torch.logaddexp(average_N + s.log(), plm_N + (1 - s).log()).mean().item() for s in shares)

    for _ in range(20):
        other_K = (weight_K.clamp(min=1e-6).log() + 0.2 * torch.randn(4, generator=generator)).softmax(dim=0)
        assert best(other_K) <= best(weight_K) + 1e-4


def test_equal_networks_share_the_weight() -> None:
    rows, cr_N_D = head(), torch.randn(N, D)
    adapter = network()
    trainings = [Trained(TrainingSettings(seed=seed), adapter, [], 1.0) for seed in range(3)]
    members = select_members(trainings, 2, held_out(torch.randint(C, (N,)), cr_N_D), rows)
    assert [member.weight for member in members] == pytest.approx([0.5, 0.5])


def test_no_probability_stays_none() -> None:
    logprobs = [torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, -torch.inf])]
    torch.testing.assert_close(mean_logprob(logprobs, (0.5, 0.5)).exp(), torch.tensor([0.5, 0.0]))

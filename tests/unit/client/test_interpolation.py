"""Schedules by hand and against the paper's recurrence; the exact choice from candidate rows, by property."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_owner_client.adapter.interpolation import Interpolation, mix
from data_owner_client.adapter.types import SCHEDULES
from data_owner_client.decoding.candidate_mixture import CandidateMixture, PlmScores
from tests import reference


@pytest.mark.parametrize(
    ("schedule", "lambda_max", "length", "expected"),
    [
        ("gradual", 0.9, 3.0, [0.9, 0.36, 0.09, 0.0, 0.0]),
        ("gradual", 1.0, 4.0, [1.0, 0.5625, 0.25, 0.0625, 0.0]),
        ("gradual", 0.6, 1.0, [0.6, 0.0, 0.0]),
        ("gradual", 0.8, 2.5, [0.8, 0.2304, 0.0256, 0.0]),
        ("linear", 0.9, 3.0, [0.9, 0.6, 0.3, 0.0, 0.0]),
        ("constant", 0.7, 2.0, [0.7, 0.7, 0.7, 0.7]),
        ("none", 0.9, 3.0, [0.0, 0.0]),
    ],
)
def test_schedules_by_hand(schedule: str, lambda_max: float, length: float, expected: list[float]) -> None:
    interpolation = Interpolation(schedule=schedule, lambda_max=lambda_max)
    positions = torch.arange(len(expected))
    weights = interpolation.lambdas(positions, torch.full((len(expected),), length, dtype=torch.float64))
    assert weights.tolist() == pytest.approx(expected, abs=1e-12)


@given(st.sampled_from(SCHEDULES), st.floats(0, 1), st.floats(1, 60), st.integers(1, 80))
def test_schedules_are_the_papers_recurrence(schedule: str, lambda_max: float, length: float, steps: int) -> None:
    interpolation = Interpolation(schedule=schedule, lambda_max=lambda_max)
    weights = interpolation.lambdas(torch.arange(steps), torch.full((steps,), length, dtype=torch.float64)).tolist()
    assert weights == pytest.approx(reference.schedule(schedule, lambda_max, length, steps), abs=1e-9)
    for t, weight in enumerate(weights):
        if interpolation.finished(t, length):
            assert weight == pytest.approx(0, abs=1e-12)
            assert max(weights[t:]) == pytest.approx(0, abs=1e-12)


def test_a_sequence_does_not_feel_its_batch() -> None:
    interpolation = Interpolation(schedule="gradual", lambda_max=0.9)
    positions, lengths = torch.tensor([2, 0, 7, 2]), torch.tensor([5.0, 9.0, 8.0, 20.0], dtype=torch.float64)
    together = interpolation.lambdas(positions, lengths)
    alone = [interpolation.lambdas(positions[i : i + 1], lengths[i : i + 1]).item() for i in range(4)]
    assert together.tolist() == alone


def test_mix_of_impossible_tokens() -> None:
    minus_infinity, half = torch.tensor(-math.inf), torch.tensor(0.5).log()
    weight = torch.tensor(0.25, dtype=torch.float64)
    assert mix(half, minus_infinity, weight).exp().item() == pytest.approx(0.375)
    assert mix(minus_infinity, half, weight).exp().item() == pytest.approx(0.125)
    assert mix(half, half, torch.tensor(0.0, dtype=torch.float64)).exp().item() == pytest.approx(0.5)
    assert mix(half, half, torch.tensor(1.0, dtype=torch.float64)).exp().item() == pytest.approx(0.5)


@given(st.data())
def test_candidates_logsumexp_and_top1_decide_as_the_whole_vocabulary_does(data: st.DataObject) -> None:
    vocabulary = data.draw(st.integers(2, 40))
    rows = data.draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    chosen = data.draw(st.sets(st.integers(0, vocabulary - 1), min_size=1))
    candidate_ids = torch.tensor(sorted(chosen))
    spread = data.draw(st.sampled_from([0.1, 1.0, 8.0]))
    plm_logits = spread * torch.randn(rows, vocabulary, generator=generator)
    pema_logits = spread * torch.randn(rows, len(candidate_ids), generator=generator)
    weights = torch.tensor(data.draw(st.lists(st.floats(0, 1), min_size=rows, max_size=rows)), dtype=torch.float64)

    plm = plm_logits.double().softmax(-1)
    pema = torch.zeros_like(plm)
    pema[:, candidate_ids] = pema_logits.double().softmax(-1)
    mixture = (1 - weights[:, None]) * plm + weights[:, None] * pema

    logsumexp = plm_logits.logsumexp(-1)
    top1_logit, top1 = plm_logits.max(-1)
    positions = PlmScores(plm_logits[:, candidate_ids] - logsumexp[:, None], top1, top1_logit - logsumexp)
    ours = CandidateMixture.from_scores(positions, pema_logits.log_softmax(-1), candidate_ids, weights).most_probable()
    # The winner's probability, not its id: float32 cannot tell ties in float64 apart.
    reached = mixture.gather(1, ours[:, None])[:, 0]
    torch.testing.assert_close(reached, mixture.max(-1).values, rtol=1e-5, atol=0)


def test_without_weight_the_plm_decides_alone() -> None:
    positions = PlmScores(torch.tensor([[-1.0, -1.0]]), torch.tensor([7]), torch.tensor([-1.0]))
    pema = torch.tensor([[-0.1, -3.0]])
    mixture = CandidateMixture.from_scores(
        positions, pema, torch.tensor([3, 7]), torch.tensor([0.0], dtype=torch.float64)
    )
    assert mixture.most_probable().tolist() == [7]

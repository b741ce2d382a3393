"""When a length reward is worth it, against Python's own statistics."""

from statistics import fmean, stdev

import pytest
import torch

from data_owner_client.training.decoding_policy import clearly_better


@pytest.mark.parametrize("gain", [-1.0, 0.0, 0.1, 0.4, 0.6, 3.0])
def test_better_by_more_than_the_standard_error(gain: float) -> None:
    other_E = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 100
    noise_E = torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    difference = (gain + noise_E).tolist()
    wanted = fmean(difference) > stdev(difference) / len(difference) ** 0.5
    assert clearly_better(other_E + gain + noise_E, other_E) is wanted


def test_the_same_scores_are_not_better_and_one_text_can_be() -> None:
    assert not clearly_better(torch.tensor([50.0, 60.0]), torch.tensor([50.0, 60.0]))
    assert clearly_better(torch.tensor([51.0]), torch.tensor([50.0]))


@pytest.mark.parametrize("texts", [2, 40, 60, 100])
def test_one_text_among_several_does_not_decide(texts: int) -> None:
    """Its gain is the standard error of all, whatever it is."""
    rng = torch.Generator().manual_seed(0)
    for _ in range(200):
        other_E = torch.rand(texts, generator=rng, dtype=torch.float64) * 100
        score_E = other_E.clone()
        score_E[torch.randint(texts, (1,), generator=rng)] += 20
        assert not clearly_better(score_E, other_E)

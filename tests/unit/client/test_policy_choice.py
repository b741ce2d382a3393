"""Choice between decoding policies: against Python's own statistics, and under noise."""

from statistics import fmean, pstdev, stdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_owner_client.training.policy_choice import clearly_better, supported_maximum
from tests.profiles import scaled

LAMBDA_P = torch.tensor([0.3, 0.45, 0.6, 0.8], dtype=torch.float64)
TEXTS = 60


def scores(best: float, curvature: float, noise: float, seed: int) -> Tensor:
    """Scores of texts that differ in difficulty, with their maximum at λ = `best` but for noise of each text and λ."""
    rng = torch.Generator().manual_seed(seed)
    difficulty_E = 25 * torch.randn(TEXTS, generator=rng, dtype=torch.float64)
    noise_P_E = noise * torch.randn(len(LAMBDA_P), TEXTS, generator=rng, dtype=torch.float64)
    return 50 + difficulty_E - curvature * (LAMBDA_P - best).square()[:, None] + noise_P_E


@pytest.mark.parametrize("gain", [-1.0, 0.0, 0.1, 0.4, 0.6, 3.0])
def test_better_by_more_than_the_standard_error(gain: float) -> None:
    other_E = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 100
    noise_E = torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    difference = (gain + noise_E).tolist()
    wanted = fmean(difference) > stdev(difference) / len(difference) ** 0.5
    assert clearly_better(other_E + gain + noise_E, other_E) is wanted


def test_equal_scores_are_not_better_and_one_text_can_be() -> None:
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


def test_noise_of_the_standard_error_replaces_an_equal_policy_as_often_as_a_normal_variable_exceeds_one() -> None:
    rng = torch.Generator().manual_seed(0)
    flips = sum(
        clearly_better(torch.randn(TEXTS, generator=rng, dtype=torch.float64), torch.zeros(TEXTS)) for _ in range(2000)
    )
    assert flips / 2000 == pytest.approx(0.159, abs=0.03)  # 1 − Φ(1)


@given(best=st.floats(0.35, 0.75), curvature=st.floats(10, 200), likeliest=st.floats(0.05, 0.99))
@settings(max_examples=scaled(30))
def test_without_noise_the_maximum_is_that_of_the_parabola(best: float, curvature: float, likeliest: float) -> None:
    found = supported_maximum(LAMBDA_P, scores(best, curvature, 0.0, seed=1), likeliest=likeliest)
    assert found == pytest.approx(best, abs=1e-6)


def test_equal_variances_weigh_scores_and_likelihood_equally() -> None:
    """Two texts whose parabolas have their maxima 0.15 to either side of 0.55: resamples have half that variance."""
    one, other = (-(LAMBDA_P - best).square() for best in (0.4, 0.7))
    # Two of four resamples have both texts (0.55), one each has a single text twice (0.4 and 0.7).
    found = supported_maximum(LAMBDA_P, torch.stack([one, other], dim=1), likeliest=0.7)
    variance = 0.5 * 0.15**2
    expected = (0.55 / variance + 0.7 / 0.15**2) / (1 / variance + 1 / 0.15**2)
    assert found == pytest.approx(expected, abs=0.01)


def test_noise_leaves_the_likeliest_value() -> None:
    found = [supported_maximum(LAMBDA_P, scores(0.5, 0.0, 30.0, seed), likeliest=0.75) for seed in range(30)]
    assert fmean(found) > 0.62
    blind = [supported_maximum(LAMBDA_P, scores(0.5, 0.0, 30.0, seed), likeliest=0.35) for seed in range(30)]
    assert fmean(blind) < 0.48


@given(slope=st.floats(0.5, 50), rising=st.booleans())
@settings(max_examples=scaled(30))
def test_beyond_the_values_it_is_the_last_of_them(slope: float, rising: bool) -> None:
    line_P = slope * (LAMBDA_P if rising else -LAMBDA_P)
    found = supported_maximum(LAMBDA_P, line_P[:, None].expand(-1, TEXTS), likeliest=0.5)
    assert found == pytest.approx(0.8 if rising else 0.3)


@given(difficulty_E=st.lists(st.floats(-100, 100), min_size=TEXTS, max_size=TEXTS))
@settings(max_examples=scaled(30))
def test_how_hard_the_texts_are_does_not_matter(difficulty_E: list[float]) -> None:
    score_P_E = scores(0.5, 40.0, 8.0, seed=3)
    harder_P_E = score_P_E + torch.tensor(difficulty_E, dtype=torch.float64)
    easy, hard = (supported_maximum(LAMBDA_P, each, likeliest=0.7) for each in (score_P_E, harder_P_E))
    assert hard == pytest.approx(easy, abs=0.03)


def test_it_jumps_less_than_the_highest_score() -> None:
    """Over fresh noise of each text, as another secret basis makes it."""
    smoothed, highest = list[float](), list[float]()
    for seed in range(60):
        score_P_E = scores(0.5, 40.0, 8.0, seed)
        smoothed.append(supported_maximum(LAMBDA_P, score_P_E, likeliest=0.5))
        highest.append(LAMBDA_P[score_P_E.mean(dim=1).argmax()].item())
    assert pstdev(smoothed) < 0.6 * pstdev(highest)
    assert fmean(smoothed) == pytest.approx(0.5, abs=0.06)

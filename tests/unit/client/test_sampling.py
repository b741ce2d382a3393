"""Draws: the filters against transformers' own, the noise against its distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from data_owner_client.decoding.sampling import Noise, draw_token, sampling_scores
from data_owner_client.decoding.settings import SamplingSettings
from protocol.errors import NumericalFault


@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 100]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    penalty=st.sampled_from([1.0, 1.2]),
)
def test_filters_are_those_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    logprob_V = (3 * torch.randn(50, generator=torch.Generator().manual_seed(seed))).double().log_softmax(-1)
    context = [3, 7, 7, 11]
    expected_1_V, ids_1_T = logprob_V[None].clone(), torch.tensor([context])
    if penalty != 1.0:
        expected_1_V = RepetitionPenaltyLogitsProcessor(penalty)(ids_1_T, expected_1_V)
    expected_1_V = TemperatureLogitsWarper(temperature)(ids_1_T, expected_1_V)
    if top_k:
        expected_1_V = TopKLogitsWarper(top_k)(ids_1_T, expected_1_V)
    if top_p < 1.0:
        expected_1_V = TopPLogitsWarper(top_p)(ids_1_T, expected_1_V)
    ours_V = sampling_scores(
        SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty),
        logprob_V,
        context,
    )
    torch.testing.assert_close(ours_V.log_softmax(-1), expected_1_V[0].log_softmax(-1))


LOGPROBS = st.lists(st.sampled_from([-math.inf, -700.0, -9.5, -3.0, -3.0 + 1e-9, -0.5, 0.0, 1e-12]), min_size=1)


def reference_probabilities(settings: SamplingSettings, logprobs: list[float], context: list[int]) -> list[float]:
    """The definition of the filters, token by token."""
    scores = [
        score if token not in context or settings.repetition_penalty == 1.0
        else score * settings.repetition_penalty if score < 0 else score / settings.repetition_penalty
        for token, score in enumerate(logprobs)
    ]  # fmt: skip
    weights = [math.exp((score - max(scores)) / settings.temperature) for score in scores]
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if settings.top_k:
        least = scores[order[: settings.top_k][-1]]
        weights = [weight if score >= least else 0.0 for weight, score in zip(weights, scores, strict=True)]
    total = math.fsum(weights)
    kept = [order[0]]
    for number, token in enumerate(order[1:], 1):
        before = math.fsum(weights[earlier] for earlier in order[:number]) / total
        assume(settings.top_p == 1.0 or abs(before - settings.top_p) > 1e-9)  # where rounding decides
        if settings.top_p == 1.0 or before < settings.top_p:
            kept.append(token)
    total = math.fsum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(scores))]


@given(
    logprobs=LOGPROBS.filter(lambda values: max(values) > -math.inf),
    temperature=st.sampled_from([5e-324, 1e-300, 1e-9, 0.7, 1.0, 1e6]),
    top_k=st.sampled_from([0, 1, 2, 7, 10**6]),
    top_p=st.sampled_from([0.0, 1e-12, 0.3, 0.9, 1.0]),
    penalty=st.sampled_from([1.0, 1.5]),
    context=st.lists(st.integers(0, 12), max_size=4),  # some are no tokens of this vocabulary
)
def test_filters_are_their_definition(
    logprobs: list[float], temperature: float, top_k: int, top_p: float, penalty: float, context: list[int]
) -> None:
    settings = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    expected = reference_probabilities(settings, logprobs, context)
    logprob_V = torch.tensor(logprobs, dtype=torch.float64)
    ours_V = sampling_scores(settings, logprob_V, context)
    torch.testing.assert_close(ours_V.softmax(-1), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-9)
    # The same among candidates, in any order and under any ids.
    ids_V, order_V = torch.arange(len(logprobs)), torch.arange(len(logprobs)).flip(0)
    if len(set(logprobs)) == len(logprobs):
        candidates_V = sampling_scores(settings, logprob_V[order_V], context, ids_V=ids_V[order_V])
        assert torch.equal(candidates_V.flip(0), ours_V)
    assert expected[draw_token(settings, logprob_V, context, Noise(1, [2], 0), 3)] > 0


@given(seed=st.integers(0, 1000), position=st.integers(0, 50))
def test_top_p_zero_takes_the_most_probable_token(seed: int, position: int) -> None:
    logprob_V = torch.randn(40, generator=torch.Generator().manual_seed(seed)).double().log_softmax(-1)
    settings = SamplingSettings(temperature=1.0, top_p=0.0)
    assert draw_token(settings, logprob_V, [], Noise(seed, [], 0), position) == int(logprob_V.argmax())


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_without_any_probability_nothing_is_drawn(value: float) -> None:
    with pytest.raises(NumericalFault, match="No token has a probability"):
        draw_token(SamplingSettings(temperature=1.0), torch.full((3,), value).double(), [], Noise(0, [], 0), 0)


def test_noise_is_gumbel_and_its_own_for_every_position() -> None:
    noise = Noise(1, [5, 6], 0)
    many = noise.gumbel(3, 100_000)
    assert many.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert many.var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)
    assert torch.equal(many, Noise(1, [5, 6], 0).gumbel(3, 100_000))
    for other in (noise.gumbel(4, 9), Noise(2, [5, 6], 0).gumbel(3, 9), Noise(1, [5], 0).gumbel(3, 9)):
        assert not torch.equal(many[:9], other)
    assert not torch.equal(many[:9], Noise(1, [5, 6], 1).gumbel(3, 9))


def test_without_temperature_the_most_probable_token_is_taken() -> None:
    logprob_V = torch.tensor([0.2, 0.5, 0.3]).double().log()
    assert draw_token(SamplingSettings(), logprob_V, [], Noise(0, [], 0), 0) == 1
    assert draw_token(SamplingSettings(repetition_penalty=3.0), logprob_V, [1], Noise(0, [], 0), 0) == 2

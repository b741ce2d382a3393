"""Draws: the filters against transformers' own, the noise against its distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from data_owner_client.decoding.sampling import Noise, draw_token, sampling_scores
from data_owner_client.decoding.settings import SamplingSettings


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
    torch.testing.assert_close(ours_V, expected_1_V[0])


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

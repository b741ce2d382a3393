"""Beam search against transformers' own, and its ends where transformers has no such rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.data.stops import Stops
from data_owner_client.decoding import decode_loop
from data_owner_client.decoding.beams.search import search_beams
from data_owner_client.decoding.decode_loop import Continuation, GenerationConfig, GenerationRequest, sequences_of
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.decoding.stats import GenerationStats
from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.plm.remote_plm import RemotePlm
from harness.tiny_models import EOS, VOCAB_SIZE, TinyModels
from plm_owner_server.service.plm_service import PlmService
from tests import support
from tests.adapters import random_adapter

STEPS = 12
BRIEF = DecodingSettings(max_new_tokens=STEPS)
PROMPTS = support.random_ids(5, [3, 9, 1, 6, 4])
STOPS = {
    "eos": frozenset({EOS}),
    # Every fourth token ends a text, so that beams end early.
    "many": frozenset(range(2, VOCAB_SIZE, 4)),
}


@pytest.fixture
def plm(tiny_service: PlmService) -> RemotePlm:
    return RemotePlm(InProcessConnection(tiny_service), dtype="float32", cache=None)


@pytest.fixture
def adapter(plm: RemotePlm) -> TrainedAdapter:
    return random_adapter(plm)


def search(
    plm: RemotePlm,
    config: GenerationConfig,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    *,
    length_penalty: float = 1.0,
    **request: Any,
) -> tuple[list[list[Continuation]], GenerationStats]:
    sequences = sequences_of(plm, [GenerationRequest(ids, 6.0, **request) for ids in prompts], config)
    return search_beams(plm, sequences, config.settings, beams=config.beams, length_penalty=length_penalty)


@pytest.fixture(scope="module", params=support.ARCHITECTURES_IN_CI)
def model(request: pytest.FixtureRequest, tiny_models: TinyModels) -> tuple[RemotePlm, Any]:
    """A tiny model behind our engine, and by transformers alone."""
    folder = tiny_models[request.param]
    plm = RemotePlm(InProcessConnection(support.make_service(folder)), dtype="float32", cache=None)
    return plm, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def until_stop(token_ids: Sequence[int], stop_ids: frozenset[int]) -> list[int]:
    """The ids up to the first stop, without the padding behind it."""
    end = next((at for at, token in enumerate(token_ids) if token in stop_ids), len(token_ids))
    return list(token_ids[: end + 1])


@pytest.mark.parametrize("stops", STOPS)
@pytest.mark.parametrize(("beams", "length_penalty"), [(2, 1.0), (3, 2.0), (4, 0.0), (4, 1.0)])
def test_all_beams_are_those_of_transformers(
    model: tuple[RemotePlm, Any], beams: int, length_penalty: float, stops: str
) -> None:
    """The PLM alone, over the whole vocabulary: all texts, in their order and with their scores."""
    plm, own = model
    stop_ids = STOPS[stops]
    config = GenerationConfig(stops=Stops(ids=stop_ids), settings=BRIEF, beams=beams)
    found, _ = search(plm, config, length_penalty=length_penalty)
    lengths = set[int]()
    for prompt, continuations in zip(PROMPTS, found, strict=True):
        expected = own.generate(
            torch.tensor([prompt]),
            num_beams=beams,
            num_return_sequences=beams,
            length_penalty=length_penalty,
            early_stopping=False,
            do_sample=False,
            max_new_tokens=STEPS,
            eos_token_id=sorted(stop_ids),
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert [each.token_ids for each in continuations] == [
            until_stop(ids[len(prompt) :], stop_ids) for ids in expected.sequences.tolist()
        ]
        scores = [each.logprob / len(each.token_ids) ** length_penalty for each in continuations]
        torch.testing.assert_close(torch.tensor(scores), expected.sequences_scores, rtol=1e-4, atol=1e-4)
        lengths |= {len(each.token_ids) for each in continuations}
    # A high length penalty prefers texts of full length.
    assert stops == "eos" or length_penalty > 0 or min(lengths) < STEPS, "no text has ended early"


@pytest.mark.parametrize("stops", STOPS)
def test_one_beam_is_greedy_decoding(model: tuple[RemotePlm, Any], stops: str) -> None:
    plm, own = model
    config = GenerationConfig(stops=Stops(ids=STOPS[stops]), settings=BRIEF, beams=2)
    sequences = sequences_of(plm, [GenerationRequest(ids) for ids in PROMPTS], config)
    found, _ = search_beams(plm, sequences, BRIEF, beams=1, length_penalty=1.0)
    greedy, _ = decode_loop.generate(plm, [GenerationRequest(ids) for ids in PROMPTS], config)
    assert [[each.token_ids for each in row] for row in found] == [[each.token_ids] for each in greedy]
    for prompt, (continuation,) in zip(PROMPTS, found, strict=True):
        ids = own.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=STEPS, eos_token_id=sorted(STOPS[stops])
        )
        assert continuation.token_ids == until_stop(ids[0, len(prompt) :].tolist(), STOPS[stops])

"""The shortest way through everything: one call of each kind over both transports, one memory trained and used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from data_owner_client import Pair, TrainingSettings, build_memories, train, translate
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.data.stops import StopMatcher
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.plm.connection.base import Connection
from data_owner_client.plm.remote_plm import RemotePlm
from harness.tiny_models import EOS, TinyModels
from plm_owner_server.service.plm_service import PlmService
from protocol.codec import Message
from protocol.messages import DecodeRequest, DistributionRequest, EncodeRequest, HeadRequest
from tests import guard, support
from tests.basis import Basis
from tests.reference import Reference, schedule

CALLS: dict[str, Callable[[Any, tuple[Any, ...]], Message]] = {
    "model_card": lambda side, context: side.model_card(*context),
    "tokenizer": lambda side, context: side.tokenizer(*context),
    "lm_head": lambda side, context: side.lm_head(HeadRequest(token_ids=[3, 9, 4]), *context),
    "encode": lambda side, context: side.encode(
        EncodeRequest(token_ids=[[5, 6, 7], [8]], from_position=[1, 0], with_logsumexp=True), *context
    ),
    "decode": lambda side, context: side.decode(DecodeRequest(token_ids=[[5, 6]], look_ahead=[3]), *context),
    "distribution": lambda side, context: side.distribution(DistributionRequest(token_ids=[5, 6], top_k=4), *context),
}
TASK = Task(name="t", source_label="In", target_label="Out", examples=({"source": "an on", "target": "die"},))
WORDS = ["the", "thin", "die", "an", "on", "shine", "her"]
PAIRS = [Pair(" ".join(WORDS[i % 7 :][: 2 + i % 3]), " ".join(WORDS[(3 * i) % 5 :][: 1 + i % 2])) for i in range(12)]
STEPS = 8
DECODING = DecodingSettings(max_new_tokens=STEPS, length_bound=False, repetition_bound=False)


@pytest.fixture(scope="module", params=["rest", "grpc"])
def connection(request: pytest.FixtureRequest, tiny_service: PlmService) -> Iterator[Connection]:
    with support.connection_over(request.param, tiny_service) as connection:
        yield connection


@pytest.mark.parametrize("call", CALLS)
def test_a_call_gives_what_the_service_does(connection: Connection, tiny_service: PlmService, call: str) -> None:
    ours, theirs = CALLS[call](connection, ()), CALLS[call](tiny_service, (guard.caller(),))
    assert type(ours) is type(theirs)
    for name in type(theirs).model_fields:
        value, expected = getattr(ours, name), getattr(theirs, name)
        if isinstance(expected, Tensor):
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-3)
        else:
            assert value == expected, name


def test_a_memory_is_built_trained_and_used_as_the_reference_says(
    connection: Connection, tiny_models: TinyModels, tmp_path: Path
) -> None:
    plm = RemotePlm(connection, dtype="float32", cache=None)
    build_memories(plm, TASK, PAIRS, tmp_path, validation=PAIRS[:3], context_mode="teacher-forced", share_targets=True)
    settings = TrainingSettings(
        rank=8, epochs=1, batch_rows=8, learning_rate=0.02, retrieved_examples=0, selection_texts=0, minutes=0
    )
    adapter = train(plm, tmp_path, tmp_path / "adapter", settings=settings)[0]
    interpolation = Interpolation(schedule="gradual", lambda_max=0.9)
    sources = ["the thin", "her shine an"]
    texts = translate(plm, sources, adapter=adapter, interpolation=interpolation, decoding=DECODING).texts

    reference = Reference(AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float64).eval())
    basis = Basis.own(plm.card.hidden_size)
    if plm.card.rotated:
        contexts = support.random_ids(3, [4] * 64)
        true_N_D = torch.stack([reference.context(ids)[0] for ids in contexts])
        basis = Basis.between(plm.encode(contexts, [3] * 64).cr_N_D, true_N_D)
    for source, text in zip(sources, texts, strict=True):
        expected = reference.decode(
            plm.tokenizer.encode_prompt(TASK.prompt(source, plm.tokenizer)),
            basis.weights(adapter),
            adapter.card.form,
            adapter.candidate_ids_C.tolist(),
            schedule("gradual", 0.9, adapter.card.expected_length(plm.tokenizer.count(source)), STEPS),
            StopMatcher(plm.tokenizer, stops := TASK.stops(plm.tokenizer, [EOS])).ids,
        )
        assert text == plm.tokenizer.decode(expected).partition(stops.texts[0])[0].strip()

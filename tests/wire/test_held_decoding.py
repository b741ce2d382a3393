"""Answers held to a schema or to choices, on a served model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from data_owner_client import (
    AnswerForm,
    DecodingSettings,
    Pair,
    RemotePlm,
    SamplingSettings,
    TrainedAdapter,
    TrainingSettings,
    build_memories,
    generate,
    train,
    translate,
)
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.data.tasks import Task
from protocol.errors import InvalidData
from tests import guard
from tests.command_line import client

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}, "of": {"enum": ["Tür", "the"]}, "n": {"type": "integer", "maximum": 99}},
    "required": ["on", "of"],
    "additionalProperties": False,
}
TASK = Task(name="t", kind="extract", answer_schema=SCHEMA, instruction="")
WORDS = ["the", "thin", "die", "Tür", "an", "on"]
PAIRS = [
    Pair(
        " ".join(WORDS[i % 5 :][: 1 + i % 3]),
        json.dumps({"on": i % 2 == 0, "of": SCHEMA["properties"]["of"]["enum"][i % 2]} | ({"n": i} if i % 3 else {})),
    )
    for i in range(24)
]
SOURCES = ["the thin", "die Tür", "an on", "reden"]


@pytest.fixture(scope="module")
def plm(tiny_server: str) -> Iterator[RemotePlm]:
    with guard.remote_plm(tiny_server) as remote:
        yield remote


@pytest.fixture(scope="module")
def folder(plm: RemotePlm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    build_memories(plm, TASK, PAIRS, folder, validation=PAIRS[:4], context_mode="teacher-forced", share_targets=True)
    settings = TrainingSettings(rank=16, epochs=6, batch_rows=16, learning_rate=0.02, retrieved_examples=0, minutes=0)
    train(plm, folder, folder / "adapter", settings=settings)
    return folder / "adapter"


@pytest.fixture(scope="module")
def adapter(folder: Path) -> TrainedAdapter:
    return TrainedAdapter.load(folder)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_answers_obey_the_tasks_schema_whatever_is_drafted(
    plm: RemotePlm, adapter: TrainedAdapter, weight: float
) -> None:
    mixture = Interpolation(schedule="constant" if weight else "none", lambda_max=weight)
    answers = []
    for look_ahead in (None, 8):
        settings = DecodingSettings(
            max_new_tokens=64, look_ahead=look_ahead, repetition_bound=False, length_bound=False
        )
        generation = translate(plm, SOURCES, adapter=adapter, interpolation=mixture, decoding=settings)
        answers.append(generation.token_ids)
        for text in generation.texts:
            jsonschema.validate(json.loads(text), SCHEMA)
    assert answers[0] == answers[1]


def test_draws_and_consensus_obey(plm: RemotePlm, adapter: TrainedAdapter) -> None:
    drawn = SamplingSettings(temperature=1.5, candidates_only=True)
    settings = DecodingSettings(max_new_tokens=64, repetition_bound=False, length_bound=False)
    samples = translate(plm, SOURCES[:2], adapter=adapter, sampling=drawn, samples=3, best=3, decoding=settings)
    consensus = translate(plm, SOURCES[:2], adapter=adapter, consensus=3, best=4, decoding=settings)
    for text in [text for texts in (*samples.best, *consensus.best) for text in texts]:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_bare_prompts_are_held_to_choices(plm: RemotePlm, adapter: TrainedAdapter) -> None:
    for model in (None, adapter):
        texts = generate(plm, ["the", "die"], adapter=model, form=AnswerForm(choices=("on", "thin", "on the"))).texts
        assert {text.strip() for text in texts} <= {"on", "thin", "on the"}


def test_holding_needs_a_form_and_a_stop_outside_of_it(plm: RemotePlm) -> None:
    settings = DecodingSettings(hold=True)
    free = Task(name="t")
    with pytest.raises(InvalidData, match="--hold needs"):
        translate(plm, ["a"], task=free, decoding=settings)
    with pytest.raises(InvalidData, match="--hold needs"):
        generate(plm, ["a"], decoding=settings)
    with pytest.raises(InvalidData, match="before it is whole"):
        translate(plm, ["a"], task=TASK, stop='"')


def test_a_schema_that_is_not_supported_is_refused_where_it_is_used(plm: RemotePlm) -> None:
    task = TASK.model_copy(update={"answer_schema": {"type": "array", "uniqueItems": True}})
    with pytest.raises(InvalidData, match="uniqueItems"):
        translate(plm, ["a"], task=task)


def test_the_plm_alone_is_held(plm: RemotePlm) -> None:
    for text in translate(plm, SOURCES, task=TASK, decoding=DecodingSettings(max_new_tokens=64)).texts:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_the_command_line_holds_unless_it_is_told_otherwise(tiny_server: str, folder: Path) -> None:
    arguments = ["--adapter", folder, "--max-new-tokens", 9, "the thin"]
    held = client(tiny_server, "apply", "--hold", *arguments)
    default, free = client(tiny_server, "apply", *arguments), client(tiny_server, "apply", "--no-hold", *arguments)
    assert (held.returncode, default.returncode, free.returncode) == (0, 0, 0)
    assert held.stdout == default.stdout


def test_the_most_probable_tokens_are_those_of_the_whole_distribution(plm: RemotePlm) -> None:
    ids_K, logprob_K = plm.most_probable([5, 6, 7], 40)
    expected = plm.distribution([5, 6, 7]).topk(40)
    assert ids_K.tolist() == expected.indices.tolist()
    torch.testing.assert_close(logprob_K, expected.values)

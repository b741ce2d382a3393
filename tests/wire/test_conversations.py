"""Conversations of several turns over both transports: a memory, a training, answers, and files of the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_owner_client import (
    ScoringSettings,
    Task,
    TrainingSettings,
    build_memories,
    evaluate,
    read_pairs,
    train,
    translate,
)
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.data.pairs import Conversation
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.memory.store import TRAIN, ExternalMemory
from data_owner_client.plm.connection.base import Connection
from data_owner_client.plm.remote_plm import RemotePlm
from harness.tiny_models import save_model
from plm_owner_server.service.plm_service import PlmService
from protocol.messages import DecodeRequest, DecodeResponse, EncodeRequest, EncodeResponse
from tests import guard, support
from tests.command_line import client, client_json
from tests.wire.test_chat import PLAIN

CHAT = Task(name="t", kind="chat")
SHORT = ["--max-new-tokens", "4"]
TOOL = {"type": "function", "function": {"name": "shine", "parameters": {"type": "object"}}}


def messages(number: int) -> list[dict[str, str]]:
    """A conversation of three answers behind a system turn."""
    turns = [{"role": "system", "content": "the thin"}]
    for turn in range(3):
        turns += [{"role": "user", "content": f"die {number} {turn}"}, {"role": "assistant", "content": "an"}]
    return turns


def write(path: Path, conversations: Sequence[Sequence[dict[str, Any]]]) -> Path:
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in conversations))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model") / "chat", chat_template=PLAIN)


@pytest.fixture(scope="module")
def service(folder: Path) -> PlmService:
    return support.make_service(folder)


@pytest.fixture(scope="module")
def owners(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)
    return tokenizer


@pytest.fixture(params=["rest", "grpc"])
def connection(request: pytest.FixtureRequest, service: PlmService) -> Iterator[Connection]:
    with support.connection_over(request.param, service) as connection:
        yield connection


@pytest.fixture(scope="module")
def url(service: PlmService) -> Iterator[str]:
    with support.serve(service) as url:
        yield url


def test_a_memory_of_conversations_answers_conversations(
    connection: Connection, owners: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, decoded = list[EncodeRequest](), list[DecodeRequest]()
    encode, decode = connection.encode, connection.decode

    def record_encode(request: EncodeRequest) -> EncodeResponse:
        encoded.append(request)
        return encode(request)

    def record_decode(request: DecodeRequest) -> DecodeResponse:
        decoded.append(request)
        return decode(request)

    monkeypatch.setattr(connection, "encode", record_encode)
    monkeypatch.setattr(connection, "decode", record_decode)
    plm = RemotePlm(connection, dtype="float32", cache=tmp_path / "cache")
    pairs = read_pairs(write(tmp_path / "train.jsonl", [messages(number) for number in range(4)]))
    memory = tmp_path / "memory"
    held_out = read_pairs(write(tmp_path / "dev.jsonl", [messages(9)]))
    build_memories(plm, CHAT, pairs, memory, validation=held_out, context_mode="teacher-forced", share_targets=True)

    # The server was shown each conversation up to the end of each answer, but for the token that ends it.
    rows = ExternalMemory(memory / TRAIN).load()
    targets = [ids.tolist() for ids in rows.target_N.split(rows.rows_E.tolist())]
    sent = [list(map(int, ids)) for request in encoded for ids in request.token_ids]
    whole = [
        owners.apply_chat_template(messages(number)[: 3 + 2 * turn], return_dict=False)
        for number in (0, 1, 2, 3, 9)
        for turn in range(3)
    ]
    space = owners("\n", add_special_tokens=False).input_ids
    assert sorted(sent) == sorted(ids[: -len(space) - 1] for ids in whole)
    assert len(targets) == 12
    for ids, target in zip(whole, targets, strict=False):
        assert ids[-len(target) - len(space) : -len(space)] == target

    settings = TrainingSettings(
        rank=8, epochs=60, batch_rows=8, learning_rate=0.02, retrieved_examples=0, selection_texts=0, minutes=0
    )
    adapter = train(plm, memory, tmp_path / "adapter", settings=settings)[0]
    decoding = DecodingSettings(max_new_tokens=12, length_bound=False, repetition_bound=False)
    certain = Interpolation(schedule="constant", lambda_max=0.999)
    questions = [Conversation(tuple(messages(7)[:end])) for end in (2, 4, 6)]
    del decoded[:]
    answers = translate(plm, questions, adapter=adapter, interpolation=certain, decoding=decoding)
    assert answers.texts == ["an"] * 3
    prompts = [
        owners.apply_chat_template(list(each.turns), return_dict=False, add_generation_prompt=True)
        for each in questions
    ]
    first = [list(map(int, ids)) for ids in decoded[0].token_ids]
    assert sorted(first) == sorted(prompts)

    evaluation = evaluate(
        plm, held_out, adapter, interpolation=certain, share_targets=True, decoding=decoding, scoring=ScoringSettings()
    )
    assert evaluation.pema == {"chrf": pytest.approx(100)}
    assert evaluation.targets == ["an"] * 3
    assert evaluation.perplexity is not None
    assert 1 <= evaluation.perplexity.mixture < min(1.5, evaluation.perplexity.plm)


def test_files_of_conversations_are_answered(url: str, tmp_path: Path) -> None:
    """Each answer is that of the library, in every form of output; and a file may go on."""
    asked = [messages(1)[:2], messages(1)[:4], messages(2)[:6]]
    path = write(tmp_path / "questions.jsonl", asked)
    with closing(guard.connection(url)) as connection:
        plm = RemotePlm(connection, cache=tmp_path / "cache")
        decoding = DecodingSettings(max_new_tokens=4)
        questions = [Conversation(tuple(turns)) for turns in asked]
        expected = translate(plm, questions, task=CHAT, decoding=decoding).texts
    assert len(set(expected)) > 1
    arguments = ["--task", "chat", "--input", path, *SHORT]
    whole = client_json(url, "apply", *arguments)
    assert [record["text"] for record in whole["texts"]] == expected
    assert [record["source"] for record in whole["texts"]] == [{"messages": turns} for turns in asked]
    output, why = tmp_path / "answers.txt", tmp_path / "why.jsonl"
    done = client(url, "apply", *arguments, "--output", output)
    assert done.returncode == 0, done.stderr
    assert output.read_text().splitlines() == [" ".join(text.splitlines()) for text in expected]
    done = client(url, "apply", *arguments, "--explain", why)
    assert done.returncode == 0, done.stderr
    explained = [json.loads(line) for line in why.read_text().splitlines()]
    assert [record["source"]["messages"] for record in explained] == asked


def test_conversations_with_tools_and_results_are_answered(url: str, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "shine", "arguments": {}}}
    turns = [
        {"role": "user", "content": "the thin"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "on"},
    ]
    path = tmp_path / "tools.jsonl"
    path.write_text(json.dumps({"messages": turns, "tools": [TOOL]}) + "\n")
    (record,) = client_json(url, "apply", "--task", "chat", "--input", path, *SHORT)["texts"]
    assert record["source"] == {"messages": turns, "tools": [TOOL]}


def test_other_tasks_refuse_conversations_and_say_what_to_do(url: str, tmp_path: Path) -> None:
    path = write(tmp_path / "questions.jsonl", [messages(1)[:2], messages(1)[:4]])
    task = tmp_path / "plain.toml"
    task.write_text('name = "plain"\n')
    done = client(url, "apply", "--task", task, "--input", path, *SHORT)
    assert done.returncode == 1
    assert "earlier turns of its conversation" in done.stderr
    assert "--task chat" in done.stderr
    done = client(url, "apply", "--task", task, "--input", path, "--skip-invalid", *SHORT)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert done.stdout.splitlines()[1] == ""
    done = client(url, "generate", "--input", path, *SHORT)
    assert done.returncode == 1
    assert "earlier turns of its conversation" in done.stderr
    whole = write(tmp_path / "whole.jsonl", [messages(1), messages(2)])
    plain = ["--task", task, "--memory", tmp_path / "m", "--share-targets"]
    done = client(url, "build-memory", *plain, "--input", whole)
    assert done.returncode == 1
    assert "earlier turns of its conversation" in done.stderr
    done = client(url, "build-memory", *plain, "--input", whole, "--skip-invalid")
    assert done.returncode == 0, done.stderr
    assert "Left out 4 of 6" in done.stderr
    assert [pair.source for pair in ExternalMemory(tmp_path / "m" / TRAIN).pairs()] in (
        [f"the thin\n\ndie {number} 0"] for number in (1, 2)
    )


def test_tools_that_the_template_does_not_write_are_counted(url: str, tmp_path: Path) -> None:
    records = [{"messages": messages(number), **({"tools": [TOOL]} if number < 2 else {})} for number in range(4)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    done = client(url, "build-memory", "--input", path, "--task", "chat", "--memory", tmp_path / "memory")
    assert done.returncode == 0, done.stderr
    # Of each conversation, a private memory learns the first answer.
    assert "The model's chat template writes no tools: 2 pairs are learned without them." in done.stderr

"""Conversations in private memories: no answer of the user's data reaches the server unless they say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_owner_client import DecodingSettings, Pair, Task, TrainingSettings, build_memories, evaluate, train
from data_owner_client.data.pairs import Conversation
from data_owner_client.memory.store import TRAIN, ExternalMemory
from data_owner_client.plm.connection.base import Connection
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import InvalidData
from tests import support

CHAT = Task(name="t", kind="chat")
CALLS = ("encode", "decode", "distribution", "lm_head")
# Single letters, which the tiny tokenizer never joins: other answers have as many tokens.
ANSWERS = ["q x z", "j v", "w k"]
OTHER_ANSWERS = ["z q x", "v j", "k w"]


class Notices(Reporter):
    """Collects what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(params=["rest", "grpc"])
def connection(request: pytest.FixtureRequest, tiny_service: PlmService) -> Iterator[Connection]:
    with support.connection_over(request.param, tiny_service) as connection:
        yield connection


@pytest.fixture
def sent(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The bodies of all requests, in order."""
    bodies: list[bytes] = []

    def recorded(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def record(request: Any) -> Any:
            bodies.append(request.to_bytes())
            return call(request)

        return record

    for name in CALLS:
        monkeypatch.setattr(connection, name, recorded(getattr(connection, name)))
    return bodies


def conversation(number: int, answers: list[str]) -> list[Pair]:
    """The pairs of a conversation of three questions, of which the second answer is not learned."""
    turns = [{"role": "system", "content": "the thin"}]
    pairs = []
    for turn, answer in enumerate(answers):
        turns.append({"role": "user", "content": f"die {number} {turn}"})
        pairs.append(Pair(turns[-1]["content"], answer, conversation=Conversation(tuple(turns)), group=str(number)))
        turns.append({"role": "assistant", "content": answer})
    return [pairs[0], pairs[2]]


def build(connection: Connection, folder: Path, answers: list[str], **options: Any) -> tuple[list[Pair], list[str]]:
    """The pairs of a memory of eight conversations, and what was said while it was built."""
    pairs = [pair for number in range(8) for pair in conversation(number, answers)]
    notices = Notices()
    plm = RemotePlm(connection, dtype="float32", cache=folder / "cache")
    report = build_memories(plm, CHAT, pairs, folder / "m", validation_fraction=0.3, reporter=notices, **options)
    stored = [*ExternalMemory(folder / "m" / TRAIN).pairs(), *ExternalMemory(folder / "m" / "validation").pairs()]
    assert report.late_answers_left_out == len(pairs) - len(stored)
    return stored, notices.said


def test_no_earlier_answer_is_sent_without_consent(connection: Connection, sent: list[bytes], tmp_path: Path) -> None:
    """With other answers of as many tokens, the very same bytes are sent."""
    requests = []
    for name, answers in (("one", ANSWERS), ("other", OTHER_ANSWERS)):
        del sent[:]
        stored, said = build(connection, tmp_path / name, answers)
        requests.append(list(sent))
        assert sorted(pair.source for pair in stored) == [f"die {number} 0" for number in range(8)]
        assert {pair.target for pair in stored} == {answers[0]}
        assert any("8 of 16 answers are left out" in line and "--share-earlier-answers" in line for line in said)
        assert any(line.endswith("No target text.") for line in said)
    assert requests[0] == requests[1]
    assert requests[0]


def test_consent_takes_all_answers(connection: Connection, sent: list[bytes], tmp_path: Path) -> None:
    requests = []
    for name, answers in (("one", ANSWERS), ("other", OTHER_ANSWERS)):
        del sent[:]
        stored, said = build(connection, tmp_path / name, answers, share_earlier_answers=True)
        requests.append(list(sent))
        assert len(stored) == 16
        assert any("earlier answers of conversations" in line for line in said)
        assert not any("left out" in line for line in said)
    assert requests[0] != requests[1]


def test_shared_targets_take_all_answers(connection: Connection, tmp_path: Path) -> None:
    stored, said = build(connection, tmp_path, ANSWERS, context_mode="teacher-forced", share_targets=True)
    assert len(stored) == 16
    assert any("every target text and earlier answers that are not learned" in line for line in said)


def test_nothing_left_is_an_error_with_what_to_do(connection: Connection, tmp_path: Path) -> None:
    plm = RemotePlm(connection, cache=tmp_path / "cache")
    late = [pair for number in range(4) for pair in conversation(number, ANSWERS)[1:]]
    with pytest.raises(InvalidData, match="Every prompt of a file would show earlier answers") as caught:
        build_memories(plm, CHAT, late, tmp_path / "m")
    assert "--share-earlier-answers" in caught.value.hint


def test_evaluation_sends_no_earlier_answer_without_consent(
    connection: Connection, sent: list[bytes], tmp_path: Path
) -> None:
    build(connection, tmp_path, ANSWERS)
    plm = RemotePlm(connection, dtype="float32", cache=tmp_path / "cache")
    settings = TrainingSettings(rank=4, epochs=1, retrieved_examples=0, selection_texts=0, minutes=0)
    adapter, _ = train(plm, tmp_path / "m", tmp_path / "adapter", settings=settings)

    def requests(answers: list[str], **options: Any) -> tuple[int, list[bytes]]:
        del sent[:]
        pairs = [pair for number in range(3) for pair in conversation(number, answers)]
        found = evaluate(plm, pairs, adapter, decoding=DecodingSettings(max_new_tokens=4), **options)
        return len(found.sources), list(sent)

    assert requests(ANSWERS) == requests(OTHER_ANSWERS)
    assert requests(ANSWERS)[0] == 3
    shared = [requests(answers, share_earlier_answers=True) for answers in (ANSWERS, OTHER_ANSWERS)]
    assert shared[0][0] == 6
    assert shared[0][1] != shared[1][1]

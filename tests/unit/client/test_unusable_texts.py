"""Texts that cannot be used: all are reported before anything is sent, or left out; blank ones have blank answers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from data_owner_client.data.pairs import Pair
from data_owner_client.data.reading.reader import spool_pairs
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.generation import Generation, generate, translate
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.memory.build_splits import build_memories
from data_owner_client.memory.store import ExternalMemory
from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.plm.remote_plm import RemotePlm
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import InvalidData, InvalidRequest

TASK = Task(name="t", source_label="In", target_label="Out")
SHORT = DecodingSettings(max_new_tokens=4)
GOOD = [Pair(f"the {i} thin", f"die {i} Tür") for i in range(20)]
BAD = [Pair("x", "two\nlines"), Pair("x" * 500, "y"), Pair("y"), Pair("z", "\nthree")]


class Recorder:
    """A connection that notes the calls that send texts."""

    def __init__(self, service: PlmService) -> None:
        self._connection = InProcessConnection(service)
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name in ("encode", "decode"):
            self.calls.append(name)
        return getattr(self._connection, name)


@pytest.fixture
def recorder(tiny_service: PlmService) -> Recorder:
    return Recorder(tiny_service)


@pytest.fixture
def plm(recorder: Recorder) -> RemotePlm:
    return RemotePlm(recorder, dtype="float32", cache=None)


def test_a_build_names_all_unusable_pairs_of_both_memories(
    plm: RemotePlm, recorder: Recorder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = [*GOOD[:3], *BAD, *GOOD[3:]]
    with pytest.raises(InvalidData) as caught:
        build_memories(plm, TASK, pairs, tmp_path, validation=[*GOOD[:2], BAD[0]])
    message = str(caught.value)
    assert "5 of 27 texts cannot be used" in message
    assert "(pairs 3, 4, 7)" in message  # the stop in targets, of both memories
    assert "1 with no target (pair 6)" in message
    assert "(pair 5)" in message
    assert "--skip-invalid" in message
    assert recorder.calls == []
    with caplog.at_level(logging.WARNING):
        report = build_memories(plm, TASK, pairs, tmp_path, validation=[*GOOD[:2], BAD[0]], skip_invalid=True)
    assert (report.examples, report.validation_examples) == (20, 2)
    assert "Left out 5 of 27 texts" in caplog.text
    assert list(ExternalMemory(tmp_path / "train").pairs()) == GOOD
    # The same call goes on with the same memory.
    assert build_memories(plm, TASK, GOOD, tmp_path, validation=GOOD[:2]).examples == 20
    with pytest.raises(
        InvalidData, match=r"2 of 24 texts .* an empty target \(pair 21\).* an empty source \(pair 22\)"
    ):
        build_memories(plm, TASK, [*GOOD, Pair("a", ""), Pair(" ", "b")], tmp_path, validation=GOOD[:2])
    with pytest.raises(InvalidData, match=r"No pair is left for .*validation"):
        build_memories(plm, TASK, GOOD, tmp_path / "other", validation=BAD, skip_invalid=True)


def test_a_build_names_the_lines_of_the_file(plm: RemotePlm, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text('source,target\na,b\nc,"d\ne"\nf,g\n')
    with pytest.raises(InvalidData, match=r"pairs\.csv:3: The target contains the stop"):
        build_memories(plm, TASK, spool_pairs(path), tmp_path / "memory", validation=GOOD)


def test_blank_texts_are_answered_by_blank_texts(plm: RemotePlm, recorder: Recorder) -> None:
    texts = ["the thin", "", " \t", "die Tür"]
    expected = translate(plm, [texts[0], texts[3]], task=TASK, decoding=SHORT).texts
    found = translate(plm, texts, task=TASK, decoding=SHORT)
    assert found.texts == [expected[0], "", "", expected[1]]
    assert [bool(ids) for ids in found.token_ids] == [True, False, False, True]
    continued = generate(plm, [texts[0], texts[3]], decoding=SHORT).texts
    assert generate(plm, texts, decoding=SHORT).texts == [continued[0], "", "", continued[1]]
    recorder.calls.clear()
    assert translate(plm, ["", " "], task=TASK).texts == ["", ""]
    assert recorder.calls == []


def test_half_a_surrogate_pair_in_a_task_is_refused(plm: RemotePlm) -> None:
    for field in ("instruction", "source_label", "target_label"):
        task = TASK.model_copy(update={field: "\ud800"})
        with pytest.raises(InvalidRequest, match="half of a surrogate pair"):
            translate(plm, ["the thin"], task=task)


def test_one_text_is_no_list_of_characters(plm: RemotePlm, recorder: Recorder) -> None:
    for run in (partial(translate, task=TASK), generate):
        with pytest.raises(InvalidData, match="One text was given in place of several"):
            run(plm, "the thin")
    assert recorder.calls == []
    long = DecodingSettings(max_new_tokens=40)
    (whole,) = generate(plm, ["the thin"], decoding=long).texts
    stop = next(whole[at : at + 2] for at in range(5, 30) if whole[at : at + 2].isascii() and whole[at] in whole[:at])
    assert generate(plm, ["the thin"], stop=stop, decoding=long).texts == [whole[: whole.index(stop)]]


def test_texts_that_cannot_be_answered_are_named_together(plm: RemotePlm, recorder: Recorder) -> None:
    texts = ["the thin", "\ud800", "x" * 5000, "y\udfff", "die"]
    runs: list[Callable[..., Generation]] = [partial(translate, task=TASK), generate]
    for run in runs:
        with pytest.raises(InvalidData) as caught:
            run(plm, texts)
        message = str(caught.value)
        assert "3 of 5 texts cannot be used" in message
        assert "half of a surrogate pair" in message
        assert "(texts 2, 4)" in message
        assert "nothing left for an answer" in message
    assert recorder.calls == []
    with pytest.raises(InvalidData, match="text 1 has a number instead of a text"):
        generate(plm, [3])  # type: ignore[list-item]
    failures: dict[int, str] = {}
    found = translate(
        plm, texts, task=TASK, decoding=SHORT, on_failure=lambda number, error: failures.update({number: str(error)})
    )
    assert list(failures) == [1, 3, 2]
    assert [bool(text) for text in found.texts][1:4] == [False, False, False]
    assert "surrogate" in failures[1]

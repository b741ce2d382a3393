"""Arguments of the Python functions as notebooks give them: taken as meant, or refused with the thing to do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.data.pairs import Pair
from data_owner_client.data.reading.reader import read_pairs
from data_owner_client.data.tasks import Task, load_task
from data_owner_client.decoding.generation import generate, ngram_drafter_for, translate
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.evaluation.evaluate import evaluate
from data_owner_client.memory.build_splits import build_memories
from data_owner_client.plm.connect import connect
from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.arguments import to_path
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.train import train
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import InvalidData, InvalidRequest
from tests.support import serve, serve_over_grpc

TASK = Task(name="t", source_label="In", target_label="Out")
SHORT = DecodingSettings(max_new_tokens=4)
PAIRS = [Pair(f"the {i} thin", f"die {i} Tür") for i in range(6)]


@pytest.fixture
def plm(tiny_service: PlmService) -> RemotePlm:
    return RemotePlm(InProcessConnection(tiny_service), cache=None)


@pytest.mark.parametrize("dtype", ["fp16", torch.float16, None, ["float16"]])
def test_unknown_number_formats_are_refused(tiny_service: PlmService, dtype: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"dtype is .* must be one of float16, bfloat16, float32, int8"):
        RemotePlm(InProcessConnection(tiny_service), dtype=dtype, cache=None)


@pytest.mark.parametrize("form", [iter, tuple, np.array, lambda texts: (text for text in texts)])
def test_texts_come_from_any_iterable(plm: RemotePlm, form: Callable[[list[str]], Any]) -> None:
    texts = ["the thin", "die Tür"]
    expected = translate(plm, texts, task=TASK, decoding=SHORT).texts
    assert translate(plm, form(texts), task=TASK, decoding=SHORT).texts == expected


def test_folders_may_be_texts_with_a_tilde(plm: RemotePlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert to_path("~/m") == tmp_path / "m"
    assert to_path(Path("a~/b")) == Path("a~/b")
    Path("pairs.txt").write_text("a\tb\n")
    assert read_pairs("~/pairs.txt", format="tsv", header=False) == [Pair("a", "b")]
    Path("task.toml").write_text('name = "own"\n')
    assert load_task("~/task.toml").name == "own"
    build_memories(
        plm, TASK, iter(PAIRS), "~/memory", validation=iter(PAIRS), context_mode="teacher-forced", share_targets=True
    )
    settings = TrainingSettings(epochs=1, rank=2, minutes=0, selection_texts=0)
    adapter, report = train(plm, "~/memory", "~/adapter", settings=settings)
    assert report.folder == str(tmp_path / "adapter")
    adapter.save("~/copy")
    assert TrainedAdapter.load("~/copy").card == TrainedAdapter.load(str(tmp_path / "adapter")).card
    assert ngram_drafter_for("~/memory")
    assert not Path("~").exists()
    found = evaluate(plm, iter(PAIRS), adapter, decoding=SHORT)
    assert len(found.pema_texts) == len(PAIRS)
    with pytest.raises(InvalidData, match="no pairs to evaluate on"):
        evaluate(plm, [], adapter)


def test_paths_are_not_read_in_place_of_objects(plm: RemotePlm, tmp_path: Path) -> None:
    paths: tuple[Any, ...] = (tmp_path, str(tmp_path))
    for path in paths:
        with pytest.raises(InvalidData, match=r"The adapter is the path .* TrainedAdapter\.load\(path\)"):
            translate(plm, ["the"], adapter=path)
        with pytest.raises(InvalidData, match=r"The adapter is the path .* TrainedAdapter\.load\(path\)"):
            generate(plm, ["the"], adapter=path)
        with pytest.raises(InvalidData, match=r"The adapter is the path .* TrainedAdapter\.load\(path\)"):
            evaluate(plm, PAIRS, path)
        with pytest.raises(InvalidData, match=r"The task is the path .* load_task\(name_or_path\)"):
            translate(plm, ["the"], task=path)
        with pytest.raises(InvalidData, match=r"The task is the path .* load_task\(name_or_path\)"):
            build_memories(plm, path, PAIRS, tmp_path)
        with pytest.raises(InvalidData, match=r"The list of pairs is the path .* read_pairs\(path\)"):
            build_memories(plm, TASK, path, tmp_path)


@pytest.mark.parametrize("wrong", [("a", "b"), {"source": "a", "target": "b"}, None])
def test_other_values_than_pairs_are_named(plm: RemotePlm, tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(InvalidData, match=r"pair 7 is a .*Give Pair\(source, target\)"):
        build_memories(plm, TASK, [*PAIRS, wrong], tmp_path)


def test_texts_without_an_order_are_refused(plm: RemotePlm) -> None:
    for texts in ({"the", "die"}, {"the": "die"}):
        with pytest.raises(InvalidData, match="in place of a list of texts"):
            generate(plm, texts, decoding=SHORT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"best": 0}, "best is 0"),
        ({"consensus": -1}, "consensus is -1"),
        ({"best": 2}, "2 best of 1"),
        ({"samples": 2}, "Without a temperature"),
        ({"samples": 2, "consensus": 2}, "both say how many"),
        ({"stop": [5]}, "a number instead of a text in a stop"),
        ({"stop": "\ud800"}, "half of a surrogate pair in a stop"),
    ],
)
def test_options_that_cannot_be_are_refused(plm: RemotePlm, options: Any, message: str) -> None:
    with pytest.raises(InvalidData, match=message):
        generate(plm, ["the"], **options)


def test_no_stop_is_none(plm: RemotePlm) -> None:
    assert generate(plm, ["the"], stop=None, decoding=SHORT).texts == generate(plm, ["the"], decoding=SHORT).texts


@pytest.mark.parametrize("run", [serve, serve_over_grpc])
def test_a_closed_connection_says_so(tiny_service: PlmService, run: Callable[..., AbstractContextManager[str]]) -> None:
    with run(tiny_service) as url:
        with connect(url) as plm:
            pass
        with pytest.raises(InvalidRequest, match=r"The connection is closed\. Connect again\."):
            generate(plm, ["the thin"], decoding=SHORT)

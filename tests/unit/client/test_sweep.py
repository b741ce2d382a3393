import csv
import json
from pathlib import Path

import pytest
import torch

from data_owner_client import Pair, RemotePlm, build_memories
from data_owner_client.data.tasks import Task
from data_owner_client.memory.store import TRAIN, ExternalMemory
from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.training.batches import FirstExamples
from data_owner_client.training.sweep import Grid, sweep
from data_owner_client.training.sweep_results import likeliest
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import InvalidData

TASK = Task(name="t", source_label="In", target_label="Out")
PAIRS = [Pair(f"the thin {number}", "die Tür " * (1 + number % 3) + str(number)) for number in range(20)]
GRID = Grid(varied={"rank": (2, 4)}, examples=(8, None), schedule=("constant", "gradual"), lambda_max=(0.2, 0.6, 0.9))


@pytest.fixture
def plm(tiny_service: PlmService, tmp_path: Path) -> RemotePlm:
    plm = RemotePlm(InProcessConnection(tiny_service), cache=None)
    build_memories(plm, TASK, PAIRS, tmp_path / "memory", validation=PAIRS[:4])
    return plm


def test_every_point_of_the_grid_has_its_row(plm: RemotePlm, tmp_path: Path) -> None:
    rows = sweep(plm, tmp_path / "memory", GRID, tmp_path / "out")
    points = {(row.settings.rank, row.examples, row.schedule, row.lambda_max) for row in rows}
    assert len(points) == len(rows) == 2 * 2 * 2 * 3
    assert {row.examples for row in rows} == {8, 20}
    assert len(likeliest(rows)) == 4
    assert likeliest(rows)[0].nll == min(row.nll for row in rows)
    assert json.loads((tmp_path / "out" / "sweep.json").read_text()) == [row.model_dump() for row in rows]
    with (tmp_path / "out" / "sweep.csv").open() as file:
        assert [float(record["nll"]) for record in csv.DictReader(file)] == [row.nll for row in rows]
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_done_again(plm: RemotePlm, tmp_path: Path) -> None:
    sweep(plm, tmp_path / "memory", Grid(varied={"rank": (2,)}, lambda_max=(0.5,)), tmp_path / "out")
    trainings = tmp_path / "out" / "trainings"
    (kept,) = trainings.iterdir()
    before = kept.stat().st_mtime_ns
    rows = sweep(plm, tmp_path / "memory", Grid(varied={"rank": (2, 3)}, lambda_max=(0.5,)), tmp_path / "out")
    assert kept.stat().st_mtime_ns == before
    assert len(list(trainings.iterdir())) == 2
    kept.write_text("[")  # half of one
    again = sweep(plm, tmp_path / "memory", Grid(varied={"rank": (2, 3)}, lambda_max=(0.5,)), tmp_path / "out")
    assert [row.nll for row in again] == [row.nll for row in rows]


def test_more_examples_than_there_are_are_refused(plm: RemotePlm, tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="has 20 examples, not 21"):
        sweep(plm, tmp_path / "memory", Grid(examples=(21,)), tmp_path / "out")


@pytest.mark.parametrize("examples", [1, 7, 8, 9, 20])
def test_the_first_examples_are_those_of_the_memory(
    tiny_service: PlmService, tmp_path: Path, examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_owner_client.memory.build._EXAMPLES_PER_SHARD", 8)
    build_memories(
        RemotePlm(InProcessConnection(tiny_service), cache=None), TASK, PAIRS, tmp_path, validation=PAIRS[:4]
    )
    memory = ExternalMemory(tmp_path / TRAIN)
    assert memory.shard_examples == [8, 8, 4]
    part = FirstExamples(memory, memory.shard_examples, examples)
    shards = [part.shard(number) for number in range(len(part.shard_rows))]
    assert [len(shard.target_N) for shard in shards] == list(part.shard_rows)
    assert sum(len(shard.rows_E) for shard in shards) == examples
    rows, whole = sum(part.shard_rows), memory.load()
    assert torch.equal(torch.cat([shard.target_N for shard in shards]), whole.target_N[:rows])
    assert torch.equal(torch.cat([shard.cr_N_D for shard in shards]), whole.cr_N_D[:rows])

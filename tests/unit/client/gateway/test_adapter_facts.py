"""The facts about an adapter against what its training had: report, memories, texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from data_owner_client.data.pairs import Pair
from data_owner_client.data.tasks import Task
from data_owner_client.gateway.adapter_facts import AdapterFacts, adapter_facts
from data_owner_client.gateway.openai.errors import EXCEPTION_HANDLERS
from data_owner_client.gateway.routes.models import facts_router
from data_owner_client.gateway.served_models import ServedModels, UnknownModel
from data_owner_client.memory.build import build_memory
from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.train import REPORT, TrainingReport, train
from plm_owner_server.service.plm_service import PlmService

TASK = Task(name="t", source_label="In", target_label="Out", examples=({"source": "an", "target": "on"},))
PAIRS = [Pair(f"the {i} thün", f"die {i} Tür") for i in range(12)]
SETTINGS = TrainingSettings(rank=4, epochs=2, reconstruction_epochs=1, minutes=0, device="cpu")


@pytest.fixture
def plm(tiny_service: PlmService) -> RemotePlm:
    return RemotePlm(InProcessConnection(tiny_service), dtype="float16", cache=None)


def trained(plm: RemotePlm, folder: Path, mode: Any) -> TrainingReport:
    for name, pairs in (("train", PAIRS[:9]), ("validation", PAIRS[9:])):
        build_memory(plm, TASK, pairs, folder / "memory" / name, context_mode=mode, share_targets=True, held_out=True)
    return train(plm, folder / "memory", folder / "adapter", settings=SETTINGS)[1]


def facts_of(plm: RemotePlm, folder: Path) -> AdapterFacts:
    return adapter_facts(ServedModels(plm, {"a": folder}, check_seconds=None).get("a"))


@pytest.mark.parametrize("mode", ["private", "teacher-forced"])
def test_facts_are_those_of_the_training(plm: RemotePlm, tmp_path: Path, mode: Any) -> None:
    report = trained(plm, tmp_path, mode)
    facts = facts_of(plm, tmp_path / "adapter")
    assert (facts.task.name, facts.context_mode, facts.rank) == ("t", mode, 4)
    assert facts.history == report.history
    assert [epoch["phase"] for epoch in facts.history] == ["reconstruction", "joint", "joint"]
    assert facts.trials == report.trials
    assert sum(facts.trial_weights) == pytest.approx(1.0)
    heaviest = max(range(len(facts.trials)), key=lambda number: facts.trial_weights[number])
    assert facts.trials[heaviest].settings == facts.settings
    assert facts.policies[0].interpolation == facts.interpolation
    assert facts.memory is not None
    assert (facts.memory.pairs, facts.memory.validation_pairs) == (9, 3)

    exchange, card = facts.exchange, plm.card
    assert exchange is not None
    assert exchange.pairs == 12
    assert exchange.source_bytes == sum(len(pair.source.encode()) for pair in PAIRS)
    shown = sum(len((pair.target or "").encode()) for pair in PAIRS)
    assert exchange.target_bytes == (0 if mode == "private" else shown)
    rows = facts.memory.rows + facts.memory.validation_rows
    assert (exchange.representations, exchange.representation_bytes) == (rows, rows * card.hidden_size * 2)
    assert exchange.head_rows is not None
    assert facts.candidates <= exchange.head_rows <= card.vocab_size
    assert exchange.head_row_bytes == exchange.head_rows * card.hidden_size * 4
    json.loads(facts.model_dump_json())


def test_facts_need_neither_report_nor_memory(plm: RemotePlm, tmp_path: Path) -> None:
    trained(plm, tmp_path, "private")
    path = tmp_path / "adapter" / REPORT
    # A report of an earlier version: the memory beside the adapter says the rest.
    record = json.loads(path.read_bytes())
    new = record.pop("exchange")
    del record["memory"]
    path.write_text(json.dumps(record), encoding="utf-8")
    exchange = facts_of(plm, tmp_path / "adapter").exchange
    assert exchange is not None
    assert exchange.model_dump() == new | {"head_rows": None, "head_row_bytes": None}

    path.unlink()
    shutil.rmtree(tmp_path / "memory")
    facts = facts_of(plm, tmp_path / "adapter")
    assert (facts.history, facts.memory, facts.exchange) == ([], None, None)
    assert facts.interpolation_why


def test_the_report_of_another_training_is_not_shown(plm: RemotePlm, tmp_path: Path) -> None:
    report = trained(plm, tmp_path, "private")
    other = report.model_copy(update={"card": report.card.model_copy(update={"mean_length": 99.0})})
    (tmp_path / "adapter" / REPORT).write_text(other.model_dump_json(), encoding="utf-8")
    assert facts_of(plm, tmp_path / "adapter").history == []


def test_the_memory_of_another_training_is_not_shown(plm: RemotePlm, tmp_path: Path) -> None:
    trained(plm, tmp_path, "private")
    shutil.rmtree(tmp_path / "memory")
    for name, pairs in (("train", PAIRS[:8]), ("validation", PAIRS[8:])):
        build_memory(plm, TASK, pairs, tmp_path / "memory" / name, context_mode="private")
    assert facts_of(plm, tmp_path / "adapter").memory is None


def test_the_plm_alone_has_no_facts(plm: RemotePlm) -> None:
    with pytest.raises(UnknownModel):
        adapter_facts(ServedModels(plm, {}, check_seconds=None).get(plm.card.name))


def test_facts_are_served(plm: RemotePlm, tmp_path: Path) -> None:
    trained(plm, tmp_path, "private")
    models = ServedModels(plm, {"my/adapter": tmp_path / "adapter"}, check_seconds=None)
    handlers: Any = EXCEPTION_HANDLERS
    app = FastAPI(exception_handlers=handlers)
    app.state.gateway = SimpleNamespace(models=models)
    app.include_router(facts_router)
    client = TestClient(app)
    served = AdapterFacts.model_validate_json(client.get("/pema/adapters/my/adapter").content)
    assert served == adapter_facts(models.get("my/adapter"))
    for other in ("nothing", plm.card.name):
        answer = client.get(f"/pema/adapters/{other}")
        assert answer.status_code == 404
        assert answer.json()["error"]["message"]


def test_an_adapter_is_trained_without_the_texts_of_its_memory(plm: RemotePlm, tmp_path: Path) -> None:
    trained(plm, tmp_path, "private")
    (tmp_path / "memory" / "train" / "pairs.jsonl").unlink()
    assert train(plm, tmp_path / "memory", tmp_path / "adapter", settings=SETTINGS)[1].exchange is None

"""The served models: identity, new versions of watched folders, and flat memory."""

from __future__ import annotations

import gc
import logging
import shutil
import weakref
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_owner_client.adapter.network import Adapter
from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.generation import translate
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.gateway.served_models import ServedModels, UnknownModel
from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.plm.identity import ModelIdentity
from data_owner_client.plm.remote_plm import RemotePlm
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import IdentityMismatch, InvalidData, InvalidRequest
from protocol.head import LMHead
from tests.adapters import adapter_card
from tests.support import until

D, C, V = 6, 5, 20
OURS = ModelIdentity(name="owner", digest="a" * 64, cr_kind="last_hidden_state", hidden_size=D, vocab_size=V)
OTHER = OURS.model_copy(update={"digest": "b" * 64})


def trained(seed: int, model: ModelIdentity = OURS) -> TrainedAdapter:
    head = LMHead(torch.randn(C, D, generator=torch.Generator().manual_seed(seed)))
    card = adapter_card(model, head, task=Task(name="t"), rank=2, interpolation_why=f"seed {seed}")
    return TrainedAdapter(card, Adapter(D, 2, "residual"), torch.arange(C), head)


def plm_of(model: ModelIdentity = OURS) -> RemotePlm:
    """Nothing but the card, which is all that is read."""
    return cast("RemotePlm", SimpleNamespace(card=SimpleNamespace(**model.model_dump())))


def seed_of(models: ServedModels) -> str:
    adapter = models.get("a").adapter
    assert adapter is not None
    return adapter.card.interpolation_why


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trained(0).save(tmp_path / "a")
    return tmp_path / "a"


@pytest.fixture
def models(folder: Path) -> Iterator[ServedModels]:
    with closing(ServedModels(plm_of(), {"a": folder}, check_seconds=None)) as served:
        yield served


def test_adapters_and_their_parent_are_served(models: ServedModels, folder: Path) -> None:
    adapter, plm = models.all()
    assert (adapter.name, adapter.folder, adapter.created) == (
        "a", folder, int((folder / "adapter.json").stat().st_mtime)
    )  # fmt: skip
    assert models.get("a") is adapter
    assert plm == models.get("owner")
    assert plm.adapter is None
    with pytest.raises(UnknownModel) as caught:
        models.get("b")
    assert caught.value.http_status == 404
    assert "a, owner" in str(caught.value)


def test_a_folder_that_cannot_be_served_is_named_at_the_start(folder: Path) -> None:
    with pytest.raises(InvalidData, match="adapter mine"):
        ServedModels(plm_of(), {"mine": folder / "nothing"}, check_seconds=None)
    with pytest.raises(IdentityMismatch, match="adapter mine belongs to owner"):
        ServedModels(plm_of(OTHER), {"mine": folder}, check_seconds=None)
    with pytest.raises(InvalidRequest, match="owner"):
        ServedModels(plm_of(), {"owner": folder}, check_seconds=None)


def test_an_adapter_of_another_model_is_refused_until_its_model_is_back(folder: Path) -> None:
    plm = plm_of()
    models = ServedModels(plm, {"a": folder}, check_seconds=None)
    ours = plm.card
    plm.card = plm_of(OTHER).card
    with pytest.raises(IdentityMismatch, match="adapter a"):
        models.get("a")
    assert models.get("owner").version == OTHER.digest[:16]
    plm.card = ours
    assert seed_of(models) == "seed 0"


STATES = ("absent", "half-written", "damaged", "card damaged", "foreign", "good")


def put(state: str, folder: Path, seed: int) -> None:
    """Change the folder as a state says; the seed is that of a new version."""
    if state == "absent":
        shutil.rmtree(folder, ignore_errors=True)
        return
    version = folder.with_name("version")
    trained(seed, OTHER if state == "foreign" else OURS).save(version)
    tensors, card = version / "adapter.safetensors", version / "adapter.json"
    folder.mkdir(exist_ok=True)
    if state == "damaged":
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(data)
    if state == "card damaged":
        card.write_bytes(card.read_bytes()[:-20])
    tensors.replace(folder / tensors.name)
    if state != "half-written":
        card.replace(folder / card.name)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(STATES), min_size=1, max_size=8))
def test_only_good_versions_replace(tmp_path_factory: pytest.TempPathFactory, states: list[str]) -> None:
    folder = tmp_path_factory.mktemp("models") / "a"
    trained(0).save(folder)
    models, expected = ServedModels(plm_of(), {"a": folder}, check_seconds=None), "seed 0"
    for seed, state in enumerate(states, 1):
        before = models.get("a")
        put(state, folder, seed)
        models.check()
        if state == "good":
            expected = f"seed {seed}"
        else:
            assert models.get("a") is before
        assert seed_of(models) == expected
        assert set(models.problems) == (set() if state == "good" else {"a"})
        assert all("adapter a" in problem for problem in models.problems.values())
        # What does not change is read once.
        models._load = None  # type: ignore[assignment,method-assign]
        models.check()
        del models._load


def test_a_version_begun_is_taken_over_when_its_card_is_there(models: ServedModels, folder: Path) -> None:
    put("half-written", folder, 1)
    models.check()
    assert seed_of(models) == "seed 0"
    trained(1).save(folder)
    models.check()
    assert seed_of(models) == "seed 1"
    assert not models.problems


def test_the_same_version_written_again_stays_the_same_object(models: ServedModels, folder: Path) -> None:
    before = models.get("a")
    assert before.adapter is not None
    before.adapter.save(folder)
    models.check()
    assert models.get("a") is before


def test_a_problem_is_logged_once(
    models: ServedModels, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    put("foreign", folder, 1)
    with caplog.at_level(logging.WARNING):
        models.check()
        models.check()
    assert [record.getMessage().count("adapter a") for record in caplog.records] == [1]


def test_old_versions_are_freed(models: ServedModels, folder: Path) -> None:
    references: list[weakref.ref[Any]] = []
    for seed in range(1, 30):
        references.append(weakref.ref(models.get("a").adapter))
        trained(seed).save(folder)
        models.check()
    gc.collect()
    assert not [reference for reference in references if reference() is not None]


def test_a_request_keeps_the_version_that_it_began_with(models: ServedModels, folder: Path) -> None:
    began = models.get("a")
    assert began.adapter is not None
    cr_N_D = torch.randn(3, D)
    before_N_C = began.adapter.logprobs(cr_N_D)
    put("good", folder, 7)
    models.check()
    assert models.get("a") is not began
    assert torch.equal(began.adapter.logprobs(cr_N_D), before_N_C)


def test_the_thread_finds_new_versions_and_ends(folder: Path) -> None:
    with closing(ServedModels(plm_of(), {"a": folder}, check_seconds=0.01)) as models:
        trained(1).save(folder)
        until(lambda: seed_of(models) == "seed 1", within_s=30)
        thread = models._thread
    assert thread is not None
    assert not thread.is_alive()


def test_no_answer_of_a_changed_model_is_used(tiny_service: PlmService, tmp_path: Path) -> None:
    connection = InProcessConnection(tiny_service)
    decode = connection.decode
    with closing(RemotePlm(connection, cache=None)) as plm:
        ids_C = torch.arange(5, 15)
        head = plm.head_rows(ids_C)
        identity = ModelIdentity.from_card(plm.card)
        card = adapter_card(identity, head, task=Task(name="t"), rank=2)
        TrainedAdapter(card, Adapter(identity.hidden_size, 2, "residual"), ids_C, head).save(tmp_path)
        adapter = ServedModels(plm, {"a": tmp_path}, check_seconds=None).get("a").adapter
        decoding = DecodingSettings(max_new_tokens=3)
        before = translate(plm, ["the thin"], adapter=adapter, decoding=decoding)
        connection.decode = lambda *request: decode(*request).model_copy(update={"digest": "0" * 64})
        with pytest.raises(IdentityMismatch, match="changed"):
            translate(plm, ["the thin"], adapter=adapter, decoding=decoding)
        connection.decode = decode
        assert translate(plm, ["the thin"], adapter=adapter, decoding=decoding).texts == before.texts

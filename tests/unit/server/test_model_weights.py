"""Weight files: safetensors and PyTorch's own format, in one file or in several; no file runs code."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from harness.tiny_models import TinyModels
from plm_owner_server.engines.loading import load_engine
from plm_owner_server.engines.model_files.digest import digest_folder
from plm_owner_server.engines.model_files.lm_head import read_head
from plm_owner_server.engines.model_files.weights import weight_files
from protocol.errors import Unsupported
from tests import support


class _Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def folder(tiny_models: TinyModels, tmp_path: Path) -> Path:
    """A tiny Llama in PyTorch's own format."""
    target = tmp_path / "model"
    shutil.copytree(tiny_models["llama"], target)
    state = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    torch.save(state, target / "pytorch_model.bin")
    return target


def divide(folder: Path) -> None:
    """Put the checkpoint into two files with an index."""
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    names = sorted(state)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, members in parts.items():
        torch.save({name: state[name] for name in members}, folder / file)
    weight_map = {name: file for file, members in parts.items() for name in members}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("form", ["one file", "legacy", "two files"])
def test_a_pytorch_checkpoint_is_the_same_model(form: str, folder: Path, tiny_models: TinyModels) -> None:
    if form == "two files":
        divide(folder)
    elif form == "legacy":
        state = torch.load(folder / "pytorch_model.bin", weights_only=True)
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    truth = transformers.AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float32)
    engine = load_engine(folder, support.make_settings(device="cpu", dtype="float32", engine="transformers"))
    assert torch.equal(engine.head.weight_V_D, truth.lm_head.weight)
    head, info = read_head(folder, dtype=torch.float32, device="cpu")  # as for vLLM
    assert torch.equal(head.weight_V_D, truth.lm_head.weight)
    assert info.vocab_size == len(truth.lm_head.weight)
    assert digest_folder(folder) == digest_folder(tiny_models["llama"])


@pytest.mark.parametrize("where", ["whole file", "beside tensors", "a part"])
def test_a_pickle_that_runs_code_is_refused(where: str, folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "attacked"
    path = folder / "pytorch_model.bin"
    if where == "whole file":
        path.write_bytes(pickle.dumps(_Attack(mark), protocol=2))
    elif where == "beside tensors":
        torch.save(torch.load(path, weights_only=True) | {"more": _Attack(mark)}, path)
    else:
        divide(folder)
        torch.save({"lm_head.weight": _Attack(mark)}, folder / "pytorch_model-00002-of-00002.bin")
    settings = support.make_settings(device="cpu", dtype="float32", engine="transformers")
    reads: list[Callable[[], object]] = [lambda: load_engine(folder, settings), lambda: digest_folder(folder)]
    if where != "a part":  # it reads no part after the head
        reads.append(lambda: read_head(folder, dtype=torch.float32, device="cpu"))
    for read in reads:
        with pytest.raises(Unsupported, match=r"pytorch_model\S*\.bin holds other things than tensors") as caught:
            read()
        assert "safetensors" in caught.value.hint
    assert not mark.exists()


def test_safetensors_go_before_pytorch_files(folder: Path, tiny_models: TinyModels, tmp_path: Path) -> None:
    shutil.copy(tiny_models["llama"] / "model.safetensors", folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Attack(tmp_path / "attacked")))
    assert weight_files(folder) == [folder / "model.safetensors"]
    assert digest_folder(folder) == digest_folder(tiny_models["llama"])


@pytest.mark.parametrize("content", [b"", b"words", b"PK\x03\x04 damaged"])
def test_a_damaged_file_is_named(content: bytes, folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(Unsupported, match=r"pytorch_model\.bin"):
        digest_folder(folder)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(Unsupported, match=r"model\.safetensors is damaged"):
        digest_folder(folder)


def test_a_missing_part_is_named(folder: Path) -> None:
    divide(folder)
    (folder / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(Unsupported, match=r"no pytorch_model-00001-of-00002\.bin"):
        weight_files(folder)


def test_a_folder_without_weights_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="no weights") as caught:
        weight_files(tmp_path)
    assert "model.safetensors" in caught.value.hint

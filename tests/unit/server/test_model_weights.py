"""Weight files: safetensors and PyTorch's own format, in one file or in several; no file runs code."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from harness.tiny_models import TinyModels
from plm_owner_server.engines.loading import load_engine
from plm_owner_server.engines.model_files.digest import digest_folder
from plm_owner_server.engines.model_files.lm_head import caps_attention, read_head
from plm_owner_server.engines.model_files.sources import resolve
from plm_owner_server.engines.model_files.tokenizer import load_tokenizer
from plm_owner_server.engines.model_files.weights import weight_files
from protocol.errors import InvalidRequest, Unsupported
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


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"lm_head.weight": 5}}'],
)
def test_a_damaged_index_is_named(content: str, folder: Path) -> None:
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
    (folder / "pytorch_model.bin.index.json").write_text(content)
    with pytest.raises(Unsupported, match=r"pytorch_model\.bin\.index\.json is damaged"):
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


SETTINGS = {"device": "cpu", "dtype": "float32", "engine": "transformers"}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture
def model(tiny_models: TinyModels, tmp_path: Path) -> Path:
    """A tiny Llama as it is saved today."""
    return Path(shutil.copytree(tiny_models["llama"], tmp_path / "model"))


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def load(folder: Path) -> None:
    load_engine(folder, support.make_settings(**SETTINGS))
    load_tokenizer(folder)


@pytest.mark.parametrize("change", ["a tensor less", "other names", "more layers"])
def test_a_checkpoint_without_all_tensors_is_refused(change: str, model: Path) -> None:
    """transformers would fill the gaps with random numbers, and the digest would not tell."""
    state = load_file(model / "model.safetensors")
    if change == "more layers":
        change_config(model, num_hidden_layers=9)
    elif change == "other names":  # as torch.nn.DataParallel saves them
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    else:
        del state["model.layers.0.mlp.down_proj.weight"]
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Unsupported, match=r"lack \d+ tensors of LlamaForCausalLM"):
        load(model)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named(file: str, model: Path, tmp_path: Path) -> None:
    (model / file).write_text(POINTER)
    with pytest.raises(Unsupported, match=f"{file} is only a pointer of Git LFS") as caught:
        load(model)
    assert f"git lfs pull --include {file}" in caught.value.hint


def test_a_safetensors_file_that_was_cut_is_damaged(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Unsupported, match=r"model\.safetensors is damaged"):
        load(model)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "cannot be loaded"),
        ({"vocab_size": 50}, "cannot be loaded"),
        ({"hidden_size": 33}, "cannot be loaded"),
        ({"model_type": "unheard-of"}, "cannot be loaded"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "Python code .* never run"),
    ],
)
def test_a_model_that_transformers_does_not_load_is_one_line(values: dict[str, Any], words: str, model: Path) -> None:
    change_config(model, **values)
    with pytest.raises(Unsupported, match=words) as caught:
        load(model)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_code_of_a_model_is_neither_run_nor_asked_about(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # as if the owner agreed
    mark = tmp_path / "attacked"
    (model / "own.py").write_text(f"open({str(mark)!r}, 'w')\nConfig = Model = Tokenizer = None\n")
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change_config(model, model_type="own", auto_map=own)
    tokenizer = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    head = partial(read_head, dtype=torch.float32, device="cpu")
    for read in (load, load_tokenizer, head, caps_attention):
        with pytest.raises(Unsupported, match="never run"):
            read(model)
    assert not mark.exists()


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "mps:7", ""])
def test_a_device_that_is_not_there_is_named(device: str, model: Path) -> None:
    with pytest.raises(InvalidRequest, match=f"--device {device} cannot be used") as caught:
        load_engine(model, support.make_settings(**SETTINGS | {"device": device}))
    assert "auto" in caught.value.hint
    assert "\n" not in str(caught.value)


def test_an_adapter_is_not_loaded_beside_a_model(model: Path) -> None:
    """The digest would not cover it."""
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/b"}))
    with pytest.raises(Unsupported, match="holds an adapter") as caught:
        load(model)
    assert "merge_and_unload" in caught.value.hint


@pytest.mark.parametrize("name", ["model.gguf", "MODEL.GGUF"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGUF\x03\0\0\0" + b"\x01" * 40, "cannot be read"),
        (b"words", "cannot be read"),
        (POINTER.encode(), "Git LFS"),
    ],
)
def test_a_gguf_file_that_is_none_is_refused(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Unsupported, match=words) as caught:
        resolve(str(tmp_path / name), tmp_path / "cache")
    assert "\n" not in str(caught.value)

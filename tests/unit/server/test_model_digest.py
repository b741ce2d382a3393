"""The digest of a model: everything that its function is made of changes it, and nothing else does."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.tiny_models import TinyModels
from plm_owner_server.engines.model_files import digest
from plm_owner_server.engines.model_files.digest import digest_folder
from protocol.errors import Unsupported
from tests import support


@pytest.fixture
def folder(tiny_models: TinyModels, tmp_path: Path) -> Path:
    target = tmp_path / "model"
    shutil.copytree(tiny_models["llama"], target)
    return target


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_any_number_of_any_tensor_changes_it(folder: Path) -> None:
    weights = folder / "model.safetensors"
    state = load_file(weights)
    seen = {digest_folder(folder)}
    assert any("lm_head" in name for name in state)
    for name, tensor in state.items():
        for place in (0, tensor.numel() // 2, tensor.numel() - 1):
            changed = tensor.clone()
            changed.view(-1)[place] += 1
            save_file(state | {name: changed}, weights)
            seen.add(digest_folder(folder))
    assert len(seen) == 1 + 3 * len(state)


def test_name_dtype_and_shape_change_it(folder: Path) -> None:
    weights = folder / "model.safetensors"
    state = load_file(weights)
    name, tensor = next((name, tensor) for name, tensor in state.items() if tensor.ndim == 2)
    others = {key: value for key, value in state.items() if key != name}
    original = digest_folder(folder)
    for changed in (
        others,
        others | {f"{name}2": tensor},
        others | {name: tensor.view(torch.int32)},
        others | {name: tensor.reshape(-1)},
    ):
        save_file(changed, weights)
        assert digest_folder(folder) != original
    save_file(dict(reversed(state.items())), weights, metadata={"written": "today"})
    assert digest_folder(folder) == original


@pytest.mark.parametrize(
    ("key", "value"), [("rope_theta", 5e5), ("sliding_window", None), ("num_attention_heads", 2), ("unheard_of", 1)]
)
def test_a_key_of_the_configuration_that_matters_changes_it(key: str, value: object, folder: Path) -> None:
    original = digest_folder(folder)
    change_json(folder / "config.json", lambda config: config.update({key: value}))
    assert digest_folder(folder) != original


def test_the_writing_of_the_configuration_does_not_change_it(folder: Path) -> None:
    path = folder / "config.json"
    change_json(path, lambda config: config.update(theta=10000.0, text_config={"eos_token_id": 1, "width": 8}))
    original = digest_folder(folder)
    config = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(config.items())), indent=7))
    assert digest_folder(folder) == original
    config |= {"theta": 10000, "transformers_version": "4.1", "_name_or_path": "elsewhere", "torch_dtype": "bfloat16"}
    config |= {"transformers.js_config": {"dtype": "q4"}, "auto_map": {"AutoConfig": "own.Config"}}
    config |= {"task_specific_params": {"text-generation": {"max_length": 50}}, "tokenizer_class": "LlamaTokenizer"}
    config["text_config"] = {"width": 8, "eos_token_id": [1, 2], "use_cache": False}
    path.write_text(json.dumps(config))
    assert digest_folder(folder) == original
    config["text_config"]["width"] = 9
    path.write_text(json.dumps(config))
    assert digest_folder(folder) != original


def test_other_files_do_not_change_it(folder: Path, tiny_models: TinyModels) -> None:
    original = digest_folder(folder)
    for name in (
        *("README.md", "LICENSE", ".gitattributes", "trainer_state.json", ".eval_results.json", "training_args.bin"),
        *("generation_config.json", "preprocessor_config.json", "adapter_model.safetensors", "model.gguf"),
    ):
        (folder / name).write_text("{}")
    (folder / ".cache").mkdir()
    assert digest_folder(folder) == original
    assert digest_folder(tiny_models["llama"]) == original  # in any folder


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer.json", lambda content: content["model"]["merges"].pop()),
        ("tokenizer.json", lambda content: content.update(normalizer={"type": "Lowercase"})),
        ("tokenizer_config.json", lambda content: content.update({"eos_token": "<pad>"})),
        ("chat_template.jinja", None),
    ],
)
def test_tokenizer_and_template_change_the_digest_on_the_card(
    file: str, change: Callable[[dict[str, Any]], Any] | None, folder: Path
) -> None:
    original = support.make_service(folder).model_card().digest
    path = folder / file
    if change is None:
        path.write_text(path.read_text() + " ")
    else:
        change_json(path, change)
    assert support.make_service(folder).model_card().digest != original


def test_the_writing_of_the_tokenizer_does_not_change_the_digest_on_the_card(folder: Path) -> None:
    original = support.make_service(folder).model_card().digest
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(dict(reversed(content.items())), indent=5))
    change_json(folder / "tokenizer_config.json", lambda content: content.update(model_max_length=77))
    assert support.make_service(folder).model_card().digest == original


def test_unchanged_files_are_read_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    read = MagicMock(wraps=digest._read_digest)
    monkeypatch.setattr(digest, "_read_digest", read)
    original = digest_folder(folder, cache)
    assert digest_folder(folder, cache) == original == digest_folder(folder)
    assert read.call_count == 2
    weights = folder / "model.safetensors"
    state = load_file(weights)
    before = weights.stat()
    save_file({name: tensor + 1 for name, tensor in state.items()}, weights, metadata={"format": "pt"})
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert weights.stat().st_size == before.st_size
    assert digest_folder(folder, cache) != original
    change_json(folder / "config.json", lambda config: config.update(rope_theta=1.0))
    assert digest_folder(folder, cache) not in {original, ""}


def test_a_record_that_cannot_be_used_is_made_again(folder: Path, tmp_path: Path) -> None:
    original = digest_folder(folder)
    assert digest_folder(folder, tmp_path / "cache") == original
    (record,) = (tmp_path / "cache").iterdir()
    record.write_text(original[:-1])
    assert digest_folder(folder, tmp_path / "cache") == original
    assert record.read_text() != original[:-1]
    (tmp_path / "file").write_text("no folder")
    assert digest_folder(folder, tmp_path / "file" / "cache") == original


def test_a_record_has_the_mode_of_other_files(folder: Path, tmp_path: Path) -> None:
    digest_folder(folder, tmp_path / "cache")
    (record,) = (tmp_path / "cache").iterdir()
    (tmp_path / "other").write_text("")
    assert record.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_record_for_which_there_is_no_space_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))  # bytes of a file
    try:
        found = digest_folder(folder, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert found == digest_folder(folder)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "\udcff"])
def test_a_damaged_configuration_is_named(content: str, folder: Path) -> None:
    (folder / "config.json").write_text(content, errors="surrogateescape")
    with pytest.raises(Unsupported, match=r"config\.json cannot be read"):
        digest_folder(folder)

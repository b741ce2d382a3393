"""Weight files of a model folder: safetensors, or else PyTorch's own format, read without running code of it."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from protocol.errors import Unsupported

# Names of a checkpoint's file or index, in the order in which transformers looks for them, and patterns of the names
# of the parts that an index lists.
_CHECKPOINTS: dict[str, tuple[str, ...]] = {
    "model.safetensors": (),
    "model.safetensors.index.json": ("model-*.safetensors",),
    "pytorch_model.bin": (),
    "pytorch_model.bin.index.json": ("pytorch_model-*.bin",),
}

# A clone without git-lfs has such texts in place of large files.
_POINTER = b"version https://git-lfs.github.com/spec/"


class _Index(BaseModel):
    weight_map: dict[str, str] = Field(min_length=1)


Tensors = dict[str, Callable[[], Tensor]]
"""Functions that read each tensor of a file, by the tensor's name."""


def checkpoint_patterns(names: Container[str]) -> tuple[str, ...]:
    """Patterns of the weight files that transformers would load from files of these names; empty if there are none."""
    name = next((name for name in _CHECKPOINTS if name in names), None)
    return () if name is None else (name, *_CHECKPOINTS[name])


def weight_files(folder: Path) -> list[Path]:
    """Files of the checkpoint that transformers loads from a folder; safetensors go before PyTorch's own format.

    Raises:
        Unsupported: the folder has no checkpoint, or only a part of one.
    """
    name = next((name for name in _CHECKPOINTS if (folder / name).is_file()), None)
    if name is None:
        raise Unsupported(
            f"{folder} has no weights that can be loaded.",
            hint=f"It must have one of these files: {', '.join(_CHECKPOINTS)}.",
        )
    if not name.endswith(".json"):
        return [folder / name]
    files = [folder / file for file in sorted(set(_weight_map(folder / name).values()))]
    for path in files:
        if not path.is_file():
            raise Unsupported(
                f"{folder} has no {path.name}, which {name} names.", hint="Copy or download the model again."
            )
    return files


@contextmanager
def open_weights(path: Path) -> Iterator[Tensors]:
    """Yield functions that read the tensors of a weight file. They are valid while the context lasts.

    Raises:
        Unsupported: the file is damaged, or would run code when it is loaded.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                yield {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118
        else:
            state = _load_pytorch(path)
            yield {name: partial(state.__getitem__, name) for name in state}
    except SafetensorError as error:
        raise Unsupported(f"{path} is damaged: {error}.", hint="Copy or download the model again.") from error


def check_folder(folder: Path) -> None:
    """Check a model folder before a library loads it: its files are whole, and no weights run code.

    Raises:
        Unsupported: the folder has no checkpoint, one that is damaged or would run code when it is loaded, or an
            adapter, which the digest would not cover.
    """
    for path in sorted(each for each in folder.iterdir() if each.is_file()):
        refuse_pointer(path)
    if (folder / "adapter_config.json").is_file():
        raise Unsupported(
            f"{folder} holds an adapter, such as LoRA's.",
            hint="Merge it into its model (merge_and_unload of peft), and save and serve that.",
        )
    for path in weight_files(folder):
        with open_weights(path):  # also finds files that were cut
            pass


def refuse_pointer(path: Path) -> None:
    """Refuse a pointer of Git LFS in the place of a file.

    Raises:
        Unsupported: the file is such a pointer.
    """
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise Unsupported(
                f"{path} is only a pointer of Git LFS, and not the file itself.",
                hint=f"Run in its folder: git lfs pull --include {path.name}",
            )


def _load_pytorch(path: Path) -> dict[str, Tensor]:
    # Without weights_only, whoever wrote the file could run code here.
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise Unsupported(
            f"{path} holds other things than tensors, and could run code when it is loaded.",
            hint="Do not load it anywhere. Get the model as safetensors, from a source that you trust.",
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise Unsupported(f"{path} is damaged.", hint="Copy or download the model again.") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise Unsupported(f"{path} is no state dict: it must map names to tensors.", hint="Save model.state_dict().")
    return state


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return _Index.model_validate_json(index.read_bytes()).weight_map
    except ValidationError as error:
        raise Unsupported(f"{index} is damaged.", hint="Copy or download the model again.") from error

"""Checkpoints: the state of a training on disk, from which it resumes bit for bit."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from data_owner_client.runtime.atomic_files import write_atomically

_BEST, _ADAPTER, _AVERAGE, _OPTIMISER, _RNG = "best.", "adapter.", "average.", "optimiser.", "rng"


@dataclass(frozen=True)
class TrainingState:
    """State of a stopped training, besides the weights and the random number generators.

    Attributes:
        progress: counters and history.
        optimiser: optimiser state of each trained tensor, by the tensor's number and the state's name.
        best: weights of the best epoch.
    """

    progress: dict[str, Any]
    optimiser: dict[int, dict[str, Tensor]]
    best: dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """File with the state of one training.

    Attributes:
        path: path of the file.
        identity: everything that decides the result, as JSON; the file of another training is ignored.
        device: device on which the adapter is trained.
    """

    path: Path
    identity: object
    device: torch.device

    def save(
        self,
        progress: dict[str, Any],
        adapter: nn.Module,
        optimiser: torch.optim.Optimizer,
        best: dict[str, Tensor],
        average: nn.Module | None,
    ) -> None:
        """Write the state, replacing the previous one.

        Raises:
            InvalidData: the disk is full.
        """
        tensors = {_ADAPTER + name: value for name, value in adapter.state_dict().items()}
        tensors |= {_BEST + name: value for name, value in best.items()}
        if average is not None:
            tensors |= {_AVERAGE + name: value for name, value in average.state_dict().items()}
        for number, state in optimiser.state_dict()["state"].items():
            tensors |= {f"{_OPTIMISER}{number}.{name}": value for name, value in state.items()}
        tensors[_RNG] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors[_RNG + ".cuda"] = torch.cuda.get_rng_state(self.device)
        # Clones: the best state may share its tensors with the adapter.
        tensors = {name: value.detach().cpu().clone() for name, value in tensors.items()}
        metadata = {"identity": self._digest, "progress": json.dumps(progress)}
        metadata["sha256"] = _checksum(tensors, metadata["progress"])
        write_atomically(self.path, safetensors.torch.save(tensors, metadata))

    def load(self, adapter: nn.Module, average: nn.Module | None) -> TrainingState | None:
        """Restore the weights and random generators; return the rest, or None if the file is missing or unusable."""
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("identity") != self._digest:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError, KeyError, TypeError, RuntimeError):
            return None
        if metadata.get("sha256") != _checksum(tensors, metadata.get("progress", "")):
            return None
        # Everything is checked before anything is changed.
        parts = {_ADAPTER: adapter} | ({} if average is None else {_AVERAGE: average})
        if not all(_fits(_part(tensors, prefix), module) for prefix, module in parts.items()):
            return None
        try:
            state = _parse(tensors, metadata["progress"])
            torch.Generator().set_state(tensors[_RNG])
        except (KeyError, ValueError, TypeError, RuntimeError):
            return None
        for prefix, module in parts.items():
            module.load_state_dict(_part(tensors, prefix))
        torch.set_rng_state(tensors[_RNG])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors[_RNG + ".cuda"], self.device)
        return state

    @property
    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True, default=str).encode()).hexdigest()


def _checksum(tensors: dict[str, Tensor], progress: str) -> str:
    return hashlib.sha256(progress.encode() + safetensors.torch.save(tensors)).hexdigest()


def _parse(tensors: dict[str, Tensor], progress: str) -> TrainingState:
    optimiser: dict[int, dict[str, Tensor]] = {}
    for name, value in _part(tensors, _OPTIMISER).items():
        number, _, field = name.partition(".")
        optimiser.setdefault(int(number), {})[field] = value
    return TrainingState(json.loads(progress), optimiser, _part(tensors, _BEST))


def _fits(part: dict[str, Tensor], module: nn.Module) -> bool:
    expected = module.state_dict()
    return part.keys() == expected.keys() and all(
        value.shape == expected[name].shape and value.dtype == expected[name].dtype for name, value in part.items()
    )


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

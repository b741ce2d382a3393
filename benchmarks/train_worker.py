"""Training process of a benchmark: ours, the reference implementation's or LoRA's. Reports in JSON."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from data_owner_client import ExternalMemory, TrainingSettings
from data_owner_client.adapter.network import Adapter
from data_owner_client.runtime.memory_usage import peak_rss_mb
from data_owner_client.runtime.progress import Bar, Reporter
from data_owner_client.training.batches import MemoryStats
from data_owner_client.training.likelihood import plm_target_logprobs
from data_owner_client.training.trainer import train_adapter
from data_owner_client.training.validation import ValidationData, target_logprobs
from plm_owner_server.settings import DEFAULT_MODEL
from protocol.cores import usable_cores
from protocol.head import LMHead

RECONSTRUCTION_EPOCHS, EPOCHS = 1, 1
_BATCH_ROWS = 512
_LORA_RATE, _LORA_HELD_OUT = 1e-3, 16


def main(kind: str, folder: str, head: str) -> None:
    """Train on `folder`/train; `head` holds all rows of the LM head, float32 [V, D], in numpy's format."""
    torch.set_num_threads(usable_cores())
    memory = ExternalMemory(Path(folder) / "train")
    weight_V_D = torch.from_numpy(np.load(head, mmap_mode="c"))
    work = {"ours": _ours, "reference": _reference, "large": _large, "lora": _lora}[kind]
    print(json.dumps(work(memory, Path(folder), weight_V_D) | {"peak_rss_mb": peak_rss_mb()}))


def _ours(memory: ExternalMemory, folder: Path, weight_V_D: Tensor) -> dict[str, Any]:
    """Train like `pema-client train`: the memory on disk, only the candidates' rows of the head."""
    started = time.perf_counter()
    stats = MemoryStats.from_memory(memory)
    head = LMHead(weight_V_D[stats.candidate_ids_C])
    validation = _validation(memory, folder, weight_V_D, stats.candidate_ids_C)
    settings = TrainingSettings(reconstruction_epochs=RECONSTRUCTION_EPOCHS, epochs=EPOCHS, batch_rows=_BATCH_ROWS)
    trained = train_adapter(memory, stats, head, validation, settings)
    rows = memory.manifest.rows * (RECONSTRUCTION_EPOCHS + EPOCHS)
    seconds = time.perf_counter() - started
    return {"rows_per_s": rows / seconds, "validation_nll": trained.best_nll, "seconds": seconds}


def _lora(memory: ExternalMemory, folder: Path, weight_V_D: Tensor) -> dict[str, Any]:
    """Train LoRA on the PLM itself for one epoch of the memory's pairs."""
    # Not above: transformers and peft must not count towards the others' memory.
    from benchmarks.in_process import model_folder, served
    from benchmarks.weights import lora
    from benchmarks.weights.tuning import Tuner
    from data_owner_client.memory.tokenized_pairs import tokenize_pairs

    pairs, task = memory.pairs(), memory.manifest.plan.task.model_copy(update={"examples": ()})
    model = model_folder(DEFAULT_MODEL)
    with served(model) as plm:
        examples = tokenize_pairs(plm, [task] * len(pairs), pairs, label="pair")
    tuner = Tuner(lora.prepare(model).model, folder / "lora")
    started = time.perf_counter()
    with redirect_stdout(sys.stderr):
        tuner.train(examples, examples[:_LORA_HELD_OUT], _LORA_RATE, 1)
    return {"seconds_per_epoch": time.perf_counter() - started, "pairs": len(examples)}


class _Rows(Dataset[tuple[Tensor, int]]):
    """Rows that are read from a file one at a time."""

    def __init__(self, memory: ExternalMemory, folder: Path) -> None:
        rows = memory.load()
        path = folder / "rows.npy"
        np.save(path, rows.cr_N_D.numpy())
        self._cr_N_D = np.load(path, mmap_mode="r")
        self._target_N = rows.target_N.tolist()

    def __len__(self) -> int:
        return len(self._target_N)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return torch.from_numpy(np.array(self._cr_N_D[number], dtype=np.float32)), self._target_N[number]


def _reference(memory: ExternalMemory, folder: Path, weight_V_D: Tensor) -> dict[str, Any]:
    """Train with the paper's form and settings, rows loaded one at a time, softmax over the full vocabulary."""
    loader = DataLoader(_Rows(memory, folder), batch_size=_BATCH_ROWS, shuffle=True)
    started = time.perf_counter()
    torch.manual_seed(0)
    hidden_size, kappa = weight_V_D.shape[1], 0.2
    adapter = Adapter(hidden_size, min(512, hidden_size), "paper", rms=MemoryStats.from_memory(memory).rms, dropout=0.2)
    optimiser = torch.optim.Adam([adapter.A.weight, adapter.B_rct.weight], lr=1e-3)
    for _ in range(RECONSTRUCTION_EPOCHS):
        for cr_B_D, _ in loader:
            x_B_D = adapter.scaled(cr_B_D)
            _step(optimiser, F.mse_loss(adapter.reconstruction(x_B_D), x_B_D))
    adapter.B_rct.requires_grad_(False)
    optimiser = torch.optim.Adam([adapter.A.weight, adapter.B_pd.weight], lr=1e-3)
    for _ in range(EPOCHS):
        for cr_B_D, target_B in loader:
            x_B_D = adapter.scaled(cr_B_D)
            reconstruction = F.mse_loss(adapter.reconstruction(x_B_D), x_B_D)
            prediction = F.cross_entropy(F.linear(adapter.hidden(x_B_D), weight_V_D), target_B)
            _step(optimiser, kappa * reconstruction + (1 - kappa) * prediction)
    seconds = time.perf_counter() - started
    all_ids_V = torch.arange(len(weight_V_D))
    validation = _validation(memory, folder, weight_V_D, all_ids_V)
    logprob_N = torch.cat(
        [
            target_logprobs(adapter, LMHead(weight_V_D), validation.data[start : start + 128])
            for start in range(0, len(validation.data), 128)
        ]
    )
    rows = memory.manifest.rows * (RECONSTRUCTION_EPOCHS + EPOCHS)
    return {
        "rows_per_s": rows / seconds,
        "validation_nll": validation.best(logprob_N, "constant")[1],
        "seconds": seconds,
    }


class _Stop(Exception):
    """Raised when a training has run long enough."""


class _Until(Reporter):
    """Ends a training after some seconds of its joint phase."""

    def __init__(self, steps_before: int, seconds: float) -> None:
        self._steps_before = steps_before
        self._seconds = seconds
        self._ends = math.inf

    @contextmanager
    def bar(self, description: str, total: int, unit: str, *, done: int = 0) -> Iterator[Bar]:
        """A bar that ends the work."""
        yield self

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """Count finished steps, and end the training when its time is over."""
        self._steps_before -= steps
        if self._steps_before == -1:
            self._ends = time.monotonic() + self._seconds
        if time.monotonic() > self._ends:
            raise _Stop


def _large(memory: ExternalMemory, folder: Path, weight_V_D: Tensor) -> dict[str, Any]:
    """Train on a memory that takes hours: the whole first phase, and two minutes of the second."""
    stats = MemoryStats.from_memory(memory)
    head = LMHead(weight_V_D)
    validation = _validation(memory, folder, weight_V_D, stats.candidate_ids_C)
    steps = math.ceil(memory.manifest.rows / _BATCH_ROWS)
    settings = TrainingSettings(reconstruction_epochs=1, epochs=1, batch_rows=_BATCH_ROWS)
    started, reporter = time.perf_counter(), _Until(steps, 120.0)
    with suppress(_Stop):
        train_adapter(memory, stats, head, validation, settings, checkpoint=folder / "checkpoint", reporter=reporter)
    # The scoring at the end of an epoch, which is not reached.
    target_logprobs(Adapter(weight_V_D.shape[1], settings.rank, "residual"), head, validation.data)
    return {"candidates": len(stats.candidate_ids_C), "seconds": time.perf_counter() - started}


def _validation(memory: ExternalMemory, folder: Path, weight_V_D: Tensor, candidate_ids_C: Tensor) -> ValidationData:
    rows = ExternalMemory(folder / "validation").load()
    ids_K = torch.unique(rows.target_N.long())
    plm_logprob_N = plm_target_logprobs(LMHead(weight_V_D[ids_K]), ids_K, rows)
    return ValidationData.from_rows(rows, candidate_ids_C, plm_logprob_N, memory.length_ratio)


def _step(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Training at OPT-1.3B's shapes: rows a second and peak GPU memory, beside LoRA and full fine-tuning.

The paper's own figures for this model are 478 MB and, for full fine-tuning, 20,082 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.machine import Machine, record
from benchmarks.gpu.models import random_model, random_texts
from benchmarks.random_rows import random_rows
from data_owner_client.adapter.bounds import TextBounds
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.training.batches import MemoryStats
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.trainer import train_adapter
from data_owner_client.training.validation import ValidationData
from protocol.head import LMHead

_PAPER_MB = {"paper_pema_mb": 478, "paper_full_mb": 20_082}
_WIDTH, _VOCABULARY, _CANDIDATES = 2048, 50_272, 5_000
_EXAMPLES = 4096
# A batch of the systems that train the PLM's weights: texts, tokens of each, and target tokens among them.
_TEXTS, _TOKENS, _TARGET_TOKENS = 16, 64, 16


@dataclass(frozen=True)
class _InRam:
    """A memory that is one shard in RAM."""

    rows: MemoryRows

    @property
    def shard_rows(self) -> Sequence[int]:
        """Rows of the shard."""
        return [len(self.rows.target_N)]

    def shard(self, number: int) -> MemoryRows:
        """The shard."""
        return self.rows


class AdapterTraining:
    """The training of an adapter on random rows.

    Args:
        machine: where it runs.
        candidates: number of candidate tokens.
        examples: number of examples.
    """

    def __init__(self, machine: Machine, candidates: int, examples: int) -> None:
        width = 64 if machine.quick else _WIDTH
        rng = torch.Generator().manual_seed(0)
        self._memory = _InRam(random_rows(examples, width, candidates, rng))
        ids_C = torch.arange(candidates)
        bounds = TextBounds(length_ratio=1.0, length_spread=1.0, longest_repetition=1)
        self._stats = MemoryStats(ids_C, 1.0, torch.eye(width), bounds)
        self._head = LMHead(torch.randn(candidates, width, generator=rng) / width**0.5)
        held_out = random_rows(16, width, candidates, rng)
        logprob_N = torch.full((len(held_out.target_N),), -5.0, dtype=torch.float64)
        self._validation = ValidationData.from_rows(held_out, ids_C, logprob_N, 1.0)
        self._settings = TrainingSettings(reconstruction_epochs=1, epochs=1, device=machine.device.type)
        self.rows = 2 * len(self._memory.rows.target_N)  # of both phases

    def run(self) -> None:
        """Train one epoch of each phase."""
        train_adapter(self._memory, self._stats, self._head, self._validation, self._settings)


def main() -> None:
    """Measure the adapter first: the others need most of a GPU's memory."""
    machine = Machine.from_arguments()
    record(_PAPER_MB)
    examples = 64 if machine.quick else _EXAMPLES
    for candidates in (_CANDIDATES, _VOCABULARY):
        training = AdapterTraining(machine, min(candidates, 512) if machine.quick else candidates, examples)
        peak = machine.peak_mb(training.run)
        rate = training.rows / machine.seconds(training.run, rounds=1)
        record({f"pema_{candidates}_candidates": {"rows_per_s": rate, "peak_gpu_mb": peak}})
    for system in ("lora", "full"):
        record({system: _tune(machine, system)})


def _tune(machine: Machine, system: str) -> dict[str, Any]:
    """Rows a second and peak memory of training the PLM's weights, which stay in float32; products in bfloat16."""
    model: Any = random_model("opt-1.3b", machine, dtype=torch.float32).train()
    if system == "lora":
        try:
            from benchmarks.weights.lora import with_updates
        except ImportError as error:
            return {"not_measured": str(error)}
        model = with_updates(model).get_base_model()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=1e-5, fused=machine.has_gpu)
    ids_B_T = torch.tensor(random_texts(machine, model, _TEXTS, _TOKENS), device=machine.device)
    targets = min(_TARGET_TOKENS, ids_B_T.shape[1] // 2)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        _loss(model, ids_B_T, targets).backward()
        optimiser.step()

    peak = machine.peak_mb(step)
    return {
        "rows_per_s": _TEXTS * targets / machine.seconds(step),
        "peak_gpu_mb": peak,
        "trained_weights": sum(weight.numel() for weight in weights),
    }


def _loss(model: Any, ids_B_T: Tensor, targets: int) -> Tensor:
    """Loss of the last tokens of each text; logits are computed only for these."""
    with torch.autocast(ids_B_T.device.type, torch.bfloat16):
        states = model.base_model(input_ids=ids_B_T[:, :-1], attention_mask=torch.ones_like(ids_B_T[:, :-1]))
        logits_N_V = model.get_output_embeddings()(states.last_hidden_state[:, -targets:].flatten(0, 1))
    return F.cross_entropy(logits_N_V.float(), ids_B_T[:, -targets:].flatten())


if __name__ == "__main__":
    main()

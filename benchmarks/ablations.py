"""Ablations of training on one memory, by the likelihood of held-out targets.

Most changes are settings of `pema-client sweep`. One is not: training also on the targets of the memory's nearest rows
(P_kNN of kNN-LM), as Memory Decoder does (Cao et al., 2025, arXiv 2508.09874).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_owner_client import TrainingSettings, build_memories, connect, load_task, read_pairs
from data_owner_client.evaluation.comparison.knn_lm import build_index, nearest_rows, tune_knn
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.runtime.progress import Reporter
from data_owner_client.training.batches import ShardSource
from data_owner_client.training.inputs import Memories, TrainingInput
from data_owner_client.training.validation import target_logprobs
from harness import report
from harness.datasets import home_assistant
from harness.processes import server
from protocol import standard_streams
from protocol.cores import usable_cores

_WORK = report.FOLDER / "ablations"
_USUAL = TrainingSettings(form="residual")
_CHANGES = {
    "as usual": _USUAL,
    "paper's form": replace(_USUAL, form="paper"),
    "recent tokens seen": replace(_USUAL, form="recent"),
    "no reconstruction phase": replace(_USUAL, reconstruction_epochs=0),
    "no reconstruction at all": replace(_USUAL, reconstruction_epochs=0, kappa=0.0),
    "last weights, not their mean": replace(_USUAL, ema_decay=0.0),
}
_SHARES = (0.25, 0.5)


def main() -> None:
    """Train, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="500 pairs and two epochs")
    quick = parser.parse_args().quick
    standard_streams.use_utf8()
    torch.set_num_threads(usable_cores())
    home_assistant.prepare(_WORK / "data")
    task = load_task(_WORK / "data" / "task.toml")
    pairs, held_out = (read_pairs(_WORK / "data" / f"{part}.jsonl") for part in ("train", "validation"))
    if quick:
        pairs, held_out = pairs[:500], held_out[:50]
    folder, reporter = _WORK / f"memory-{len(pairs)}", Reporter()
    with server(_WORK / "server.log") as (_, grpc_port), connect(f"grpc://127.0.0.1:{grpc_port}") as plm:
        build_memories(plm, task, pairs, folder, validation=held_out, context_mode="teacher-forced", share_targets=True)
        memories = Memories.open(folder, plm)
        inputs = TrainingInput.from_memories(plm, memories, _USUAL, reporter)
    works = {name: (inputs, settings) for name, settings in _CHANGES.items()}
    near = NearTargets.of(memories, inputs)
    for share in _SHARES:
        taught = replace(inputs, rows=Taught(inputs.rows, near, share), identity=[*inputs.identity, share])
        works[f"{share:.0%} of the targets from P_kNN"] = taught, _USUAL
    figures: dict[str, object] = {"pairs": len(pairs), "rows": memories.train.manifest.rows, "plm_nll": inputs.plm_nll}
    for name, (data, settings) in works.items():
        changed = replace(settings, epochs=2) if quick else settings
        trained = data.fit(changed, _WORK / "checkpoint.safetensors", reporter)
        logprob_N = target_logprobs(trained.adapter, inputs.targets.candidates, inputs.validation.data)
        interpolation, nll = inputs.validation.best(logprob_N, "constant")
        figures[name] = {"nll": nll, "lambda": interpolation.lambda_max}
        print(f"{name}: {nll:.4f} nats per token at λ {interpolation.lambda_max}", flush=True)
    report.write("ablations", figures)


@dataclass(frozen=True)
class NearTargets:
    """Targets of each row's K nearest other rows.

    Attributes:
        target_N_K: token ids of the targets, int32.
        weight_N_K: weights in P_kNN, float32.
    """

    target_N_K: Tensor
    weight_N_K: Tensor

    @classmethod
    def of(cls, memories: Memories, inputs: TrainingInput) -> NearTargets:
        """Find neighbours with the K and the temperature that make the validation rows likeliest."""
        index, label_N = build_index(memories.train, inputs.stats.candidate_ids_C)
        neighbours, temperature, _ = tune_knn(index, label_N, inputs.validation)
        rows = memories.train.load()
        distance_N_K, row_N_K = nearest_rows(index, rows.representations_N_D(), neighbours + 1)
        distance_N_K[row_N_K == torch.arange(len(row_N_K))[:, None]] = math.inf  # of a row to itself
        weight_N_K = (-distance_N_K / temperature).softmax(dim=-1)
        print(f"P_kNN of {neighbours} rows at temperature {temperature:.3g}", flush=True)
        return cls(rows.target_N[row_N_K], weight_N_K)


class Taught:
    """A memory in which some rows have a near row's target, drawn again each time a shard is read.

    The expected loss is the cross-entropy with (1 − share)·[y] + share·P_kNN.
    """

    def __init__(self, memory: ShardSource, near: NearTargets, share: float) -> None:
        self._memory, self._near, self._share = memory, near, share
        self._rng = torch.Generator().manual_seed(0)

    @property
    def shard_rows(self) -> Sequence[int]:
        """Number of rows of each shard."""
        return self._memory.shard_rows

    def shard(self, number: int) -> MemoryRows:
        """The rows of one shard."""
        rows, start = self._memory.shard(number), sum(self.shard_rows[:number])
        span = slice(start, start + len(rows.target_N))
        drawn_N_1 = torch.multinomial(self._near.weight_N_K[span], 1, generator=self._rng)
        near_N = self._near.target_N_K[span].gather(1, drawn_N_1)[:, 0]
        is_taught_N = torch.rand(len(near_N), generator=self._rng) < self._share
        return replace(rows, target_N=torch.where(is_taught_N, near_N, rows.target_N))


if __name__ == "__main__":
    main()

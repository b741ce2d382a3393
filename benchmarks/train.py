"""Speed of training against the reference implementation, and peak memory on a large external memory.

The baseline is the training loop that the paper describes: the paper's form and settings, rows loaded one at a time,
softmax over the full vocabulary. Both run one epoch of each phase on one memory, in turn, in separate processes. The
large memory is synthetic: 1,000,000 rows x 2,048 (float16), with targets among 50,272 tokens, the sizes of OPT-1.3B.
For comparison, LoRA (`benchmarks.weights`) trains on the PLM itself for one epoch of the memory's pairs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.decode import prepare
from benchmarks.random_rows import ROWS_PER_EXAMPLE, random_rows
from data_owner_client import ExternalMemory
from data_owner_client.memory.manifest import MemoryPlan
from harness import report
from plm_owner_server.engines.model_files.sources import resolve
from plm_owner_server.engines.transformers.engine import load_model
from plm_owner_server.settings import DEFAULT_MODEL, ServerSettings

_WORK = report.FOLDER / "train"
_WIDTH, _VOCABULARY = 2048, 50_272
_EXAMPLES_PER_SHARD = 512


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round, and a large memory of 100,000 rows")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (5 minutes each)")
    arguments = parser.parse_args()
    rounds, large_rows = (1, 100_000) if arguments.quick else (arguments.rounds, 1_000_000)
    memory, head = prepare().parent / "memory", _WORK / "head.npy"
    _write_head(head)
    rows = {"ours": list[dict[str, float]](), "reference": list[dict[str, float]]()}
    for _ in range(rounds):
        for kind, records in rows.items():
            records.append(_run(kind, memory, head))
    lora = _run("lora", memory, head)
    large, large_head = _large_memory(large_rows, ExternalMemory(memory / "train").manifest.plan)
    try:
        peak = _run("large", large, large_head)
    finally:
        shutil.rmtree(large, ignore_errors=True)
    ours, reference = (
        {name: median(record[name] for record in records) for name in records[0]} for records in rows.values()
    )
    report.write(
        "train",
        {
            "rounds": rounds,
            "threads": torch.get_num_threads(),
            "memory_rows": ExternalMemory(memory / "train").manifest.rows,
            "ours": ours,
            "reference": reference,
            "lora": lora,
            "rows_over_reference": ours["rows_per_s"] / reference["rows_per_s"],
            "large": {"rows": large_rows} | peak,
            f"peak_rss_mb_{'1m' if large_rows == 1_000_000 else f'{large_rows // 1000}k'}_rows": peak["peak_rss_mb"],
        },
    )


def _run(kind: str, memory: Path, head: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.train_worker", kind, str(memory), str(head)]
    record: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return record


def _write_head(path: Path) -> None:
    """Write all rows of the default model's LM head, unless they exist."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = resolve(DEFAULT_MODEL, ServerSettings(_env_file=None).cache_dir).folder
    head: Any = load_model(folder, device="cpu", dtype="float32").get_output_embeddings()
    np.save(path, head.weight.detach().numpy())


def _large_memory(rows: int, like: MemoryPlan) -> tuple[Path, Path]:
    """Write a synthetic memory and an LM head for it. Return their paths."""
    folder, rng = _WORK / "large", torch.Generator().manual_seed(0)
    shutil.rmtree(folder, ignore_errors=True)
    model = like.model.model_copy(update={"hidden_size": _WIDTH, "vocab_size": _VOCABULARY, "name": "synthetic"})
    for part, count in (("train", rows), ("validation", 2_000)):
        examples = count // ROWS_PER_EXAMPLE
        changed = {"model": model, "examples": examples, "examples_per_shard": _EXAMPLES_PER_SHARD}
        memory = ExternalMemory.open_or_create(folder / part, like.model_copy(update=changed))
        for start in range(0, examples, _EXAMPLES_PER_SHARD):
            memory.append(random_rows(min(_EXAMPLES_PER_SHARD, examples - start), _WIDTH, _VOCABULARY, rng))
    head = folder / "head.npy"
    np.save(head, torch.randn(_VOCABULARY, _WIDTH, generator=rng).div(_WIDTH**0.5).numpy())
    return folder, head


if __name__ == "__main__":
    main()

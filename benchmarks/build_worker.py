"""Client process of a benchmark: connects, waits for a line on standard input, builds a memory, reports in JSON."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import torch

from data_owner_client import connect, load_task, read_pairs
from data_owner_client.memory.build import build_memory
from data_owner_client.runtime.memory_usage import peak_rss_mb


def main(url: str, data: str, start: str, stop: str, folder: str) -> None:
    """Build a memory of the pairs [start, stop)."""
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    task = load_task(Path(data) / "task.toml")
    pairs = read_pairs(Path(data) / "train.jsonl")[int(start) : int(stop)]
    with connect(url) as plm:
        plm.tokenizer.count("loaded before the clock starts")
        print("ready", flush=True)
        sys.stdin.readline()
        started = time.perf_counter()
        memory = build_memory(plm, task, pairs, Path(folder), context_mode="teacher-forced", share_targets=True)
        seconds = time.perf_counter() - started
    print(json.dumps({"rows": memory.manifest.rows, "seconds": seconds, "peak_rss_mib": peak_rss_mb() * 1e6 / 2**20}))


if __name__ == "__main__":
    main(*sys.argv[1:])

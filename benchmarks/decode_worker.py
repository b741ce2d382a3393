"""One client of a benchmark: connects, waits for its turn on standard input, translates, reports in JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from data_owner_client import DecodingSettings, Interpolation, TrainedAdapter, connect, read_pairs, translate


def main(url: str, data: str, adapter: str, start: str, stop: str) -> None:
    """Translate the test sentences [start, stop) one at a time, as somebody at a keyboard would."""
    torch.set_num_threads(1)
    sources = [pair.source for pair in read_pairs(Path(data) / "test.jsonl")][int(start) : int(stop)]
    trained = TrainedAdapter.load(Path(adapter))
    settings = DecodingSettings(batch_size=1)
    with connect(url) as plm:
        trained.card.task.stop_ids(plm.tokenizer)  # loaded before the clock starts
        print("ready", flush=True)
        sys.stdin.readline()
        started = time.perf_counter()
        result = translate(
            plm, sources, adapter=trained, interpolation=Interpolation(schedule="gradual"), decoding=settings
        )
        seconds = time.perf_counter() - started
    print(json.dumps({"tokens": result.usage.tokens, "seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])

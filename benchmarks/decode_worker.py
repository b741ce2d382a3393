"""Client process of a benchmark: connects, waits for a line on standard input, translates, reports in JSON."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

import torch

from data_owner_client import DecodingSettings, Interpolation, TrainedAdapter, connect, read_pairs, translate


def main(url: str, data: str, adapter: str, start: str, stop: str, seconds: str) -> None:
    """Translate the test sentences [start, stop) again and again, one at a time like a user at a keyboard.

    Only tokens that are final before `seconds` have passed are counted, because all clients are busy until then.
    """
    torch.set_num_threads(1)
    sources = [pair.source for pair in read_pairs(Path(data) / "test.jsonl")][int(start) : int(stop)]
    trained = TrainedAdapter.load(Path(adapter))
    gradual, settings = Interpolation(schedule="gradual"), DecodingSettings(batch_size=1)
    tokens = 0
    with connect(url) as plm:
        plm.tokenizer.ids_containing("\n")  # found before the clock starts
        print("ready", flush=True)
        sys.stdin.readline()
        deadline = time.perf_counter() + float(seconds)

        def count(text: int, token: int) -> None:
            nonlocal tokens
            tokens += time.perf_counter() < deadline

        for source in itertools.cycle(sources):
            if time.perf_counter() >= deadline:
                break
            translate(plm, [source], adapter=trained, interpolation=gradual, decoding=settings, on_token=count)
    print(json.dumps({"tokens": tokens}))


if __name__ == "__main__":
    main(*sys.argv[1:])

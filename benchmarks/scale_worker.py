"""Client process of `benchmarks.scale`: sends prepared requests one after another for a while, reports in JSON."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path

import torch

from data_owner_client.plm.connection.open import open_connection
from protocol.messages import DecodeRequest, EncodeRequest

LOOK_AHEAD = 24
"""Tokens that are drafted after each prompt."""


def main(url: str, requests: str, kind: str, seconds: str, core: str | None = None) -> None:
    """Request all positions of texts (`encode`), or drafts after prompts (`decode`, `decode_8` for batches of 8)."""
    if core is not None:
        os.sched_setaffinity(0, {int(core)})
    torch.set_num_threads(1)
    prepared = json.loads(Path(requests).read_text(encoding="utf-8"))
    connection, max_tokens = open_connection(url), prepared["max_tokens"] - LOOK_AHEAD

    def rows(texts: list[list[int]]) -> int:
        if kind == "encode":
            return len(connection.encode(EncodeRequest(token_ids=texts, from_position=[0] * len(texts))).cr_N_D)
        prompts = [ids[:max_tokens] for ids in texts]
        return len(connection.decode(DecodeRequest(token_ids=prompts, look_ahead=[LOOK_AHEAD] * len(texts))).top1_N)

    rows(prepared[kind][0])  # everything is loaded before the clock starts
    print("ready", flush=True)
    sys.stdin.readline()
    started, count = time.perf_counter(), 0
    for texts in itertools.cycle(prepared[kind]):
        if time.perf_counter() - started >= float(seconds):
            break
        count += rows(texts)
    print(json.dumps({"rows": count, "seconds": time.perf_counter() - started}))
    connection.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

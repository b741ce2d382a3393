"""The gateway against the command: throughput, time to the first token, memory, and answers that differ.

`overhead` is the throughput of 16 concurrent clients of a gateway over that of one `translate` with batches of 16. Both
answer the same texts in turns, on one server. `first_token_ms_over_round_trip` is the time to the first text of a
stream over that of the first call that `translate` makes to the owner's server. A proxy adds a round-trip time, and
each text is used once, so that the server has none in its cache. `memory` is the growth of a gateway with a tiny model
while it answers requests, of which a tenth are cut off.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch

from benchmarks.decode import prepare
from benchmarks.gateway_memory import measure_memory
from data_owner_client import DecodingSettings, TrainedAdapter, connect, read_pairs, translate
from data_owner_client.plm.connection.base import Attempt
from harness import report
from harness.gateways import running_gateway
from harness.processes import run_together, server
from harness.tcp_proxy import delaying_proxy
from protocol.cores import usable_cores

_WORK = report.FOLDER / "gateway"
_DATA = report.FOLDER / "decode" / "data"
_MODEL = "demo"
_CLIENTS = 16
_MEMORY_PAIRS = 1000  # of the training pairs; the others are texts that nobody has seen
_ROUND_TRIPS_MS = (0, 20, 100)
_FIRST_TOKENS = 8  # longest answer whose first token is timed
_TIMEOUT_SECONDS = 300.0
_PARTS = ("overhead", "first-token", "memory")


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer texts, one pair of turns and 1,000 requests")
    parser.add_argument("--pairs", type=int, default=6, help="pairs of turns, a minute each")
    parser.add_argument("--requests", type=int, default=10_000, help="requests of the measurement of memory")
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=_PARTS, help="measure these alone")
    arguments = parser.parse_args()
    sentences, pairs, firsts = (48, 1, 20) if arguments.quick else (200, arguments.pairs, 120)
    requests = 1000 if arguments.quick else arguments.requests
    threads = usable_cores()
    torch.set_num_threads(threads)
    shutil.rmtree(_WORK, ignore_errors=True)
    _WORK.mkdir(parents=True)
    figures, wrong = dict[str, Any](), 0
    if {"overhead", "first-token"} & {*arguments.parts}:
        adapter = prepare()
        with server(_WORK / "server.log", "--threads", str(threads)) as ports:
            url = f"http://127.0.0.1:{ports.rest}"
            if "overhead" in arguments.parts:
                sources = [pair.source for pair in read_pairs(_DATA / "test.jsonl")][:sentences]
                found, wrong = _overhead(url, adapter, sources, pairs, threads)
                figures |= found
            if "first-token" in arguments.parts:
                unseen = [pair.source for pair in read_pairs(_DATA / "train.jsonl")][_MEMORY_PAIRS:]
                figures |= _first_token(url, adapter, unseen, firsts, threads)
    if "memory" in arguments.parts:
        memory = measure_memory(_WORK, requests, _CLIENTS)
        wrong += memory["wrong"]
        figures |= {"memory_mib_per_1000_requests": memory["mib_per_1000_requests"], "memory": memory}
    report.write("gateway", figures | {"wrong": wrong, "clients": _CLIENTS, "threads": threads})


def _overhead(url: str, adapter: Path, sources: Sequence[str], pairs: int, threads: int) -> tuple[dict[str, Any], int]:
    """Throughput of the gateway over that of `translate`, in pairs of turns, and the number of different answers."""
    texts = _WORK / "texts.json"
    texts.write_text(json.dumps(list(sources)), encoding="utf-8")
    rates: dict[str, list[float]] = {"translate": [], "whole": [], "streamed": []}
    with running_gateway(
        _WORK / "gateway.log", url, {_MODEL: adapter}, "--threads", str(threads), "--batch-size", str(_CLIENTS)
    ) as gateway:

        def turn(kind: str) -> dict[str, Any]:
            ours = ["translate", url, str(adapter), str(texts), str(_CLIENTS), str(threads)]
            theirs = ["ask", gateway.url, _MODEL, str(texts), str(_CLIENTS), kind]
            (record,) = run_together("benchmarks.gateway_worker", [ours if kind == "translate" else theirs])
            return record

        # Fills the prefix cache for all alike. The number of tokens is that of the same texts in each turn.
        expected = turn("translate")
        wrong = 0
        for pair in range(pairs):
            # Each kind comes first, and each last, equally often.
            for kind in [*rates][:: -1 if pair % 2 else 1]:
                record = turn(kind)
                rates[kind].append(expected["tokens"] / record["seconds"])
                wrong += sum(one != other for one, other in zip(record["texts"], expected["texts"], strict=True))
    ratios = {
        kind: [one / other for one, other in zip(rates[kind], rates["translate"], strict=True)]
        for kind in ("whole", "streamed")
    }
    return {
        "overhead": median(ratios["whole"]),
        "overhead_streamed": median(ratios["streamed"]),
        "overhead_pairs": ratios,
        "tokens_per_s": {kind: median(values) for kind, values in rates.items()},
        "tokens_a_turn": expected["tokens"],
        "pairs": pairs,
    }, wrong


def _first_token(url: str, adapter: Path, sources: Sequence[str], count: int, threads: int) -> dict[str, Any]:
    """Time to the first text of a stream over the round trip of the owner's server, for each time of the network."""
    chance, port, found = random.Random(0), httpx.URL(url).port or 80, dict[str, dict[str, float]]()
    unseen = chance.sample(sources, 2 * count * len(_ROUND_TRIPS_MS))
    for number, ms in enumerate(_ROUND_TRIPS_MS):
        texts = unseen[2 * count * number :][: 2 * count]
        with (
            delaying_proxy("127.0.0.1", port, ms / 1000) as far_port,
            running_gateway(
                _WORK / "gateway.log",
                far := f"http://127.0.0.1:{far_port}",
                {_MODEL: adapter},
                *("--threads", str(threads)),
            ) as gateway,
        ):
            first_ms, round_trip_ms = _in_turns(gateway.url, far, adapter, texts)
        found[str(ms)] = {
            "first_token_ms": median(first_ms),
            "round_trip_ms": median(round_trip_ms),
            "ratio": median(first_ms) / median(round_trip_ms),
        }
    return {"first_token_ms_over_round_trip": max(each["ratio"] for each in found.values()), "first_token": found}


def _in_turns(gateway: str, owner: str, adapter: Path, texts: Sequence[str]) -> tuple[list[float], list[float]]:
    """Milliseconds to the first text of each second text through the gateway, and of the first call of the others."""
    first_ms, round_trip_ms, trained = list[float](), list[float](), TrainedAdapter.load(adapter)
    bound = DecodingSettings(max_new_tokens=_FIRST_TOKENS)
    with connect(owner) as plm, httpx.Client(base_url=gateway, timeout=_TIMEOUT_SECONDS, trust_env=False) as client:
        _ms_to_first_text(client, texts[0])
        translate(plm, texts[1:2], adapter=trained, decoding=bound)
        for number, text in enumerate(texts[2:]):
            if number % 2:
                first_ms.append(_ms_to_first_text(client, text))
                continue
            attempts = list[Attempt]()
            with plm.observed_by(attempts.append):
                translate(plm, [text], adapter=trained, decoding=bound)
            round_trip_ms.append(1000 * attempts[0].seconds)
    return first_ms, round_trip_ms


def _ms_to_first_text(client: httpx.Client, text: str) -> float:
    """Milliseconds from a request to the first piece of its answer; infinite if the answer is empty."""
    body = {
        "model": _MODEL,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": _FIRST_TOKENS,
        "stream": True,
    }
    first_ms, started = float("inf"), time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if first_ms == float("inf") and line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                if choice["delta"].get("content"):
                    first_ms = 1000 * (time.perf_counter() - started)
    return first_ms


if __name__ == "__main__":
    main()

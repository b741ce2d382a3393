"""Two replicas against one, and the vLLM engine against bare vLLM and the engine over transformers.

A replica is a server process with one thread, pinned to one core. Its client sends prepared token ids, ignores the
results and shares the core, as if each replica were a machine. The engines have all cores, and two clients at a time.
Bare vLLM is an `AsyncLLM` with equal settings and as many texts in flight: its pooling runner for encoding, and its
`generate` for decoding in batches of several sizes by one client. Both engines and bare vLLM are loaded at the same
time and take short turns. No engine has cached states of a text before its first use.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from data_owner_client import connect, load_task, read_pairs
from data_owner_client.memory.tokenized_pairs import tokenize_pair
from harness import report
from harness.datasets import home_assistant
from harness.processes import Worker, run_together, server
from plm_owner_server.engines.model_files.sources import resolve
from plm_owner_server.settings import DEFAULT_MODEL, ServerSettings

_WORK = report.FOLDER / "scale"
_DATA, _LOG, _REQUESTS = _WORK / "data", _WORK / "server.log", _WORK / "requests.json"
_BATCH, _CLIENTS = 32, 2
_KINDS = ("encode", "decode")
_DECODE_BATCHES = (1, 8, 32)
# Turns of each engine in a round.
_TURNS = 4
_VLLM_FLAGS = ["--engine", "vllm", "--dtype", "float32"]


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="model, as for pema-server")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="length of each measurement; an engine's is in turns"
    )
    parser.add_argument("--requests", type=int, default=8, help=f"number of requests with {_BATCH} texts each")
    parser.add_argument(
        "--vllm-python", default=".venv-vllm/bin/python", help="Python of the environment that `make test-vllm` makes"
    )
    parser.add_argument("--no-vllm", action="store_true", help="only the replicas")
    arguments = parser.parse_args()
    if not arguments.no_vllm and not Path(arguments.vllm_python).is_file():
        parser.error(f"{arguments.vllm_python} does not exist: run make .venv-vllm/ready, or give --no-vllm")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        parser.error("two replicas need two cores")
    model = ["--model", arguments.model]
    prepared = _prepare(model, arguments.requests)
    folder = resolve(arguments.model, ServerSettings(_env_file=None).cache_dir).folder
    figures: dict[str, list[float]] = defaultdict(list)
    seconds: float = arguments.seconds
    for _, kind in itertools.product(range(arguments.rounds), _KINDS):
        for count in (1, 2):
            figures[f"replicas_{count}_{kind}"].append(_replicas(model, cores[:count], kind, seconds))
        if not arguments.no_vllm:
            for name, rates in _engines(model, folder, len(cores), kind, seconds, arguments.vllm_python).items():
                figures[name] += rates
    report.write("scale", _summary(figures) | prepared | {"rounds": arguments.rounds, "seconds": seconds})


def _summary(figures: dict[str, list[float]]) -> dict[str, Any]:
    """Medians over all turns: ratios of measurements of one turn, and rows per second."""
    ratios = {
        "replicas_2_over_1": ("replicas_2_encode", "replicas_1_encode"),
        "replicas_2_over_1_decode": ("replicas_2_decode", "replicas_1_decode"),
        "vllm_encode_over_bare": ("vllm_encode", "bare_vllm_encode"),
        "vllm_encode_over_transformers": ("vllm_encode", "transformers_encode"),
        "vllm_decode_over_transformers": ("vllm_decode", "transformers_decode"),
    } | {
        f"vllm_decode_over_bare_{size}": (f"vllm_decode_{size}", f"bare_vllm_decode_{size}") for size in _DECODE_BATCHES
    }
    summary: dict[str, Any] = {
        name: median(ours / theirs for ours, theirs in zip(figures[above], figures[below], strict=True))
        for name, (above, below) in ratios.items()
        if figures[above]
    }
    return summary | {"rows_per_s": {name: median(values) for name, values in figures.items() if values}}


def _prepare(model: Sequence[str], requests: int) -> dict[str, Any]:
    """Write the token ids of all requests. Return figures about the texts and the model."""
    home_assistant.prepare(_DATA)
    task, pairs = load_task(_DATA / "task.toml"), read_pairs(_DATA / "train.jsonl")[: requests * _BATCH]
    with server(_LOG, *model) as (rest_port, _), connect(f"http://127.0.0.1:{rest_port}") as plm:
        tokens = [tokenize_pair(plm, task, pair) for pair in pairs]
        max_tokens = plm.card.limits.max_sequence_tokens
        card = {"model": plm.card.name, "hidden_size": plm.card.hidden_size, "dtype": plm.card.dtype}
    prompts, texts = [pair.prompt for pair in tokens], [[*pair.prompt, *pair.target][:max_tokens] for pair in tokens]
    batches = {"encode": _batches(texts, _BATCH), "decode": _batches(prompts, _BATCH)}
    batches |= {f"decode_{size}": _batches(prompts, size) for size in _DECODE_BATCHES}
    _REQUESTS.write_text(json.dumps({"max_tokens": max_tokens, **batches}), encoding="utf-8")
    return card | {"tokens_per_text": sum(map(len, texts)) / len(texts)}


def _batches(texts: list[list[int]], size: int) -> list[list[list[int]]]:
    return [texts[i : i + size] for i in range(0, len(texts), size)]


def _replicas(model: Sequence[str], cores: Sequence[int], kind: str, seconds: float) -> float:
    """Total rows per second of all replicas, each on one core with its client."""
    with ExitStack() as stack:
        ports = [
            stack.enter_context(
                server(
                    _WORK / f"server-{core}.log",
                    *model,
                    *("--threads", "1", "--prefix-cache-mib", "0"),
                    cores=[core],
                )
            )
            for core in cores
        ]
        clients = [
            [f"grpc://127.0.0.1:{grpc_port}", str(_REQUESTS), kind, str(seconds), str(core)]
            for (_, grpc_port), core in zip(ports, cores, strict=True)
        ]
        return _rows_per_s(run_together("benchmarks.scale_worker", clients))


def _engines(
    model: Sequence[str], folder: Path, threads: int, kind: str, seconds: float, python: str
) -> dict[str, list[float]]:
    """Rows per second of both engines and of bare vLLM, which take short turns while all are loaded.

    The speed of a shared machine changes within minutes, so neighbours in time are compared.

    Args:
        model: flags of the server that name the model.
        folder: folder of the model.
        threads: threads of each.
        kind: kind of request.
        seconds: length of all turns of a side together.
        python: Python of vLLM's environment.
    """
    flags = [*model, "--threads", str(threads)]
    # Drafting requests one text many times; encoding would find a text cached only because requests repeat.
    flags += ["--prefix-cache-mib", "0" if kind == "encode" else "1024"]
    # Bare vLLM decodes for one client at each of several batch sizes.
    sides = {kind: ["transformers", "vllm", "bare_vllm"]}
    if kind == "decode":
        sides = {kind: ["transformers", "vllm"]} | {f"decode_{size}": ["vllm", "bare_vllm"] for size in _DECODE_BATCHES}
    clients = {name: _CLIENTS if name == kind else 1 for name in sides}
    of_bare = [name for name, taking in sides.items() if "bare_vllm" in taking]
    rates = defaultdict[str, list[float]](list)
    with (
        server(_LOG, *flags) as (_, transformers_port),
        server(_WORK / "server-vllm.log", *flags, *_VLLM_FLAGS, python=python) as (_, vllm_port),
        Worker(
            "benchmarks.scale_bare",
            [str(folder), str(_REQUESTS), str(threads), str(clients[of_bare[0]]), *of_bare],
            python,
        ) as bare,
    ):
        bare.wait_until_ready()
        ports = {"transformers": transformers_port, "vllm": vllm_port}
        for turn, (name, taking) in itertools.product(range(_TURNS), sides.items()):
            first = turn % len(taking)
            for side in taking[first:] + taking[:first]:
                if side == "bare_vllm":
                    bare.send(f"{name} {seconds / _TURNS}")
                    records = [bare.record()]
                else:
                    words = [f"grpc://127.0.0.1:{ports[side]}", str(_REQUESTS), name, str(seconds / _TURNS)]
                    records = run_together("benchmarks.scale_worker", [words] * clients[name])
                rate = _rows_per_s(records)
                rates[f"{side}_{name}"].append(rate)
                print(f"{side}_{name}: {rate:.1f} rows/s", flush=True)
    return rates


def _rows_per_s(reports: Sequence[dict[str, Any]]) -> float:
    return sum(float(one["rows"]) / float(one["seconds"]) for one in reports)


if __name__ == "__main__":
    main()

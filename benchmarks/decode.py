"""Decoding with PEMA over a network: with and without look-ahead, near and far, against local `generate`.

The owner's server is a separate process. A proxy on this machine adds the round-trip time. The baseline is the greedy
`generate` of transformers for the bare model, with the same prompts, stops, batch size and threads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from data_owner_client import (
    DecodingSettings,
    ExternalMemory,
    Generation,
    Interpolation,
    RemotePlm,
    Task,
    TrainedAdapter,
    TrainingSettings,
    build_memories,
    connect,
    load_task,
    read_pairs,
    train,
    translate,
)
from data_owner_client.data.stops import StopMatcher
from data_owner_client.decoding.stats import GenerationStats
from harness import report
from harness.datasets import home_assistant
from harness.processes import run_together, server
from harness.tcp_proxy import delaying_proxy
from plm_owner_server.engines.model_files.sources import resolve
from plm_owner_server.engines.transformers.engine import load_model
from plm_owner_server.settings import DEFAULT_MODEL, ServerSettings
from protocol.cores import usable_cores
from protocol.errors import InvalidData

_WORK = report.FOLDER / "decode"
_DATA, _LOG = _WORK / "data", _WORK / "server.log"
_ROUND_TRIPS_MS = (0, 20, 100)
_GRADUAL = Interpolation(schedule="gradual", lambda_max=0.9)
_BATCH = 32
# The default with the client's own drafts, and fixed look-aheads of the server without them.
_VARIANTS: dict[str, DecodingSettings] = {
    "default": DecodingSettings(batch_size=_BATCH),
    "none": DecodingSettings(look_ahead=0, batch_size=_BATCH),
    **{f"server-{k}": DecodingSettings(look_ahead=k, batch_size=_BATCH) for k in (1, 2, 4, 8)},
}
_PER_CLIENT = 25  # test sentences of each client


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer sentences and one round")
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured (15 minutes each)")
    parser.add_argument(
        "--variants",
        nargs="*",
        choices=_VARIANTS,
        help="compare numbers of drafts only, all of them unless some are named",
    )
    arguments = parser.parse_args()
    sentences, seconds, rounds = (48, 10, 1) if arguments.quick else (200, 30, arguments.rounds)
    threads = usable_cores()
    torch.set_num_threads(threads)
    adapter_folder = prepare()
    adapter = TrainedAdapter.load(adapter_folder)
    sources = [pair.source for pair in read_pairs(_DATA / "test.jsonl")][:sentences]
    if arguments.variants is not None:
        _compare_variants(arguments.variants or list(_VARIANTS), adapter, sources, rounds, threads)
        return
    with server(_LOG) as (port, _), connect(f"http://127.0.0.1:{port}") as plm:
        baseline = Baseline(plm, adapter.card.task, sources)
    speedups: dict[int, list[float]] = {ms: [] for ms in _ROUND_TRIPS_MS}
    trips: dict[int, list[float]] = {ms: [] for ms in _ROUND_TRIPS_MS}
    against_local, clients = list[float](), list[float]()
    for _ in range(rounds):
        with server(_LOG, "--threads", str(threads)) as (_, grpc_port):
            for ms in _ROUND_TRIPS_MS:
                with delaying_proxy("127.0.0.1", grpc_port, ms / 1000) as port:
                    without, with_drafts = _in_turns(port, adapter, sources)
                speedups[ms].append(_tokens_per_s(*with_drafts) / _tokens_per_s(*without))
                usage = sum((generation.stats for generation in with_drafts), start=GenerationStats())
                trips[ms].append(usage.round_trips / usage.tokens)
            ours = _translate(grpc_port, adapter, sources, None)
            one, eight = (_clients(count, seconds, grpc_port, adapter_folder) for count in (1, 8))
            clients.append(eight / one)
        against_local.append(_tokens_per_s(ours) / baseline.tokens_per_s())
    report.write(
        "decode",
        {
            "sentences": sentences,
            "rounds": rounds,
            "threads": threads,
            "round_trips_per_token": {str(ms): median(values) for ms, values in trips.items()},
            "lookahead_speedup": {str(ms): median(values) for ms, values in speedups.items()},
            "vs_local_generate": median(against_local),
            "clients_8_over_1": median(clients),
        },
    )


def _compare_variants(
    names: Sequence[str], adapter: TrainedAdapter, sources: Sequence[str], rounds: int, threads: int
) -> None:
    """Measure numbers of drafts on the same texts, one after another, in the opposite order for every other text."""
    rates: dict[str, dict[str, list[float]]] = {str(ms): {name: [] for name in names} for ms in _ROUND_TRIPS_MS}
    totals = {ms: dict.fromkeys(names, GenerationStats()) for ms in rates}
    for _ in range(rounds):
        with server(_LOG, "--threads", str(threads)) as (_, grpc_port):
            _translate_as(grpc_port, adapter, sources, _VARIANTS["none"])  # fills the prefix cache for all alike
            for ms in _ROUND_TRIPS_MS:
                with delaying_proxy("127.0.0.1", grpc_port, ms / 1000) as port:
                    runs = {name: [_translate_as(port, adapter, sources[::2], _VARIANTS[name])] for name in names}
                    for name in reversed(names):
                        runs[name].append(_translate_as(port, adapter, sources[1::2], _VARIANTS[name]))
                for name, generations in runs.items():
                    if [one.token_ids for one in generations] != [one.token_ids for one in runs[names[0]]]:
                        raise AssertionError(f"{name} changed a text")
                    rates[str(ms)][name].append(_tokens_per_s(*generations))
                    for one in generations:
                        totals[str(ms)][name] += one.stats
    report.write(
        "decode",
        {
            "sentences": len(sources),
            "rounds": rounds,
            "threads": threads,
            "tokens_per_s": {ms: {name: median(values) for name, values in row.items()} for ms, row in rates.items()},
            "round_trips_per_token": {
                ms: {name: stats.round_trips / stats.tokens for name, stats in row.items()}
                for ms, row in totals.items()
            },
            "drafts_per_token": {
                ms: {name: stats.drafted / stats.tokens for name, stats in row.items()} for ms, row in totals.items()
            },
            "accepted_share": {
                ms: {name: stats.accepted / max(1, stats.drafted) for name, stats in row.items()}
                for ms, row in totals.items()
            },
            "over_default": {
                ms: {
                    name: median(ours / theirs for ours, theirs in zip(values, row["default"], strict=True))
                    for name, values in row.items()
                }
                for ms, row in rates.items()
                if "default" in row
            },
        },
    )


def prepare() -> Path:
    """Make an adapter and its memory of 1,000 pairs, unless they exist. Return the adapter's folder."""
    home_assistant.prepare(_DATA)
    memory, adapter = _WORK / "memory", _WORK / "adapter"
    try:
        TrainedAdapter.load(adapter)
        ExternalMemory(memory / "train")
    except InvalidData:
        task, pairs = load_task(_DATA / "task.toml"), read_pairs(_DATA / "train.jsonl")[:1000]
        held_out = read_pairs(_DATA / "validation.jsonl")[:100]
        with server(_LOG) as (_, grpc_port), connect(f"grpc://127.0.0.1:{grpc_port}") as plm:
            build_memories(
                plm, task, pairs, memory, validation=held_out, context_mode="teacher-forced", share_targets=True
            )
            train(
                plm,
                memory,
                adapter,
                settings=TrainingSettings(retrieved_examples=0, selection_texts=0, minutes=0),
            )
    return adapter


def _translate(port: int, adapter: TrainedAdapter, sources: Sequence[str], look_ahead: int | None) -> Generation:
    return _translate_as(port, adapter, sources, DecodingSettings(look_ahead=look_ahead, batch_size=_BATCH))


def _translate_as(port: int, adapter: TrainedAdapter, sources: Sequence[str], settings: DecodingSettings) -> Generation:
    with connect(f"grpc://127.0.0.1:{port}") as plm:
        _stop_ids(plm, adapter.card.task)  # found before the clock starts
        return translate(plm, sources, adapter=adapter, interpolation=_GRADUAL, decoding=settings)


def _stop_ids(plm: RemotePlm, task: Task) -> frozenset[int]:
    return StopMatcher(plm.tokenizer, task.stops(plm.tokenizer, plm.card.eos_token_ids)).ids


def _in_turns(
    port: int, adapter: TrainedAdapter, sources: Sequence[str]
) -> tuple[tuple[Generation, ...], tuple[Generation, ...]]:
    """Translate without look-ahead and with it, half of the texts in one order and half in the other.

    Other work on a shared machine thus slows both equally.
    """
    one, other = sources[::2], sources[1::2]
    first, second = (_translate(port, adapter, one, k) for k in (0, None))
    third, fourth = (_translate(port, adapter, other, k) for k in (None, 0))
    return (first, fourth), (second, third)


def _tokens_per_s(*generations: Generation) -> float:
    return sum(g.stats.tokens for g in generations) / sum(g.seconds for g in generations)


def _clients(count: int, seconds: float, port: int, adapter: Path) -> float:
    """Total tokens per second of several clients that translate one sentence at a time."""
    spans = [range(i * _PER_CLIENT, (i + 1) * _PER_CLIENT) for i in range(count)]
    url = f"grpc://127.0.0.1:{port}"
    arguments = [(url, str(_DATA), str(adapter), str(s.start), str(s.stop), str(seconds)) for s in spans]
    return float(sum(record["tokens"] for record in run_together("benchmarks.decode_worker", arguments)) / seconds)


class Baseline:
    """Greedy `generate` of transformers for the bare model on this machine.

    Args:
        plm: the remote model, whose tokenizer is used.
        task: the task that makes the prompts.
        sources: the texts to translate.
    """

    def __init__(self, plm: RemotePlm, task: Task, sources: Sequence[str]) -> None:
        settings, tokenizer = ServerSettings(_env_file=None), plm.tokenizer
        folder = resolve(DEFAULT_MODEL, settings.cache_dir).folder
        self._model: Any = load_model(folder, device="cpu", dtype="float32")
        prompts = [tokenizer.encode_prompt(task.prompt(source, tokenizer)) for source in sources]
        self._prompts = sorted(prompts, key=len, reverse=True)
        self._stops = sorted(_stop_ids(plm, task))

    @torch.inference_mode()
    def tokens_per_s(self) -> float:
        """Tokens per second, longest prompts first, padded on the left."""
        tokens, started = 0, time.perf_counter()
        for at in range(0, len(self._prompts), _BATCH):
            batch = [torch.tensor(ids) for ids in self._prompts[at : at + _BATCH]]
            ids_B_T, mask_B_T = (
                nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
                for rows in (batch, [torch.ones_like(ids) for ids in batch])
            )
            output_B_T = self._model.generate(
                ids_B_T,
                attention_mask=mask_B_T,
                do_sample=False,
                max_new_tokens=DecodingSettings().max_new_tokens,
                eos_token_id=self._stops,
                pad_token_id=0,
            )[:, ids_B_T.shape[1] :]
            for row in output_B_T.tolist():
                tokens += next((i + 1 for i, token in enumerate(row) if token in self._stops), len(row))
        return tokens / (time.perf_counter() - started)


if __name__ == "__main__":
    main()

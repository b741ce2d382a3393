"""The engine with packed weights against the same engine without, on a CPU: passes over prompts, and drafting."""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

from harness import report
from plm_owner_server.engines.interface import DraftBatch, EncodeBatch
from plm_owner_server.engines.model_files.sources import resolve
from plm_owner_server.engines.transformers.engine import TransformersEngine, load_model
from plm_owner_server.settings import DEFAULT_MODEL, ServerSettings
from protocol.cores import usable_cores

_PROMPT_TOKENS = 80
_STEPS = 12


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round")
    rounds = 1 if parser.parse_args().quick else 5
    torch.set_num_threads(usable_cores())
    engines = {packed: _engine(packed=packed) for packed in (False, True)}
    figures: dict[str, object] = {"rounds": rounds, "prompt_tokens": _PROMPT_TOKENS}
    for sequences in (1, 8, 32):
        generator = torch.Generator().manual_seed(sequences)
        ids = torch.randint(10, 10_000, (sequences, _PROMPT_TOKENS), generator=generator).tolist()
        measures = {"prompts_s": _prompts_s, "step_s": _step_s}
        for name, measure in measures.items():
            seconds: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(rounds):
                for packed, engine in engines.items():
                    seconds[packed].append(measure(engine, ids))
            plain_s, packed_s = median(seconds[False]), median(seconds[True])
            figures[f"{name}.{sequences}"] = {"plain": plain_s, "packed": packed_s, "speedup": plain_s / packed_s}
    report.write("packing", figures)


def _engine(*, packed: bool) -> TransformersEngine:
    folder = resolve(DEFAULT_MODEL, ServerSettings(_env_file=None).cache_dir).folder
    model = load_model(folder, device="cpu", dtype="float32")
    engine = TransformersEngine(model, cr_kind="last_hidden_state", prefix_cache_bytes=0, pack_weights=packed)
    engine.warm_up()
    return engine


def _prompts_s(engine: TransformersEngine, ids: list[list[int]]) -> float:
    started = time.perf_counter()
    engine.encode(EncodeBatch(ids, [0] * len(ids)))
    return time.perf_counter() - started


def _step_s(engine: TransformersEngine, ids: list[list[int]]) -> float:
    drafting = engine.drafting(batch_tokens=4096)
    drafting.join([DraftBatch(ids, [_PROMPT_TOKENS - 1] * len(ids), [_STEPS + 1] * len(ids))])
    drafting.step()
    started = time.perf_counter()
    for _ in range(_STEPS):
        drafting.step()
    return (time.perf_counter() - started) / _STEPS


if __name__ == "__main__":
    main()

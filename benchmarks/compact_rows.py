"""Cost of each number format of rows: the mixture's negative log-likelihood on the demo task's validation pairs.

One memory is built in float32 and converted to the other formats by the function that the server uses. Training uses
equal settings and seeds for all formats.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, get_args

import torch

from data_owner_client import ExternalMemory, TrainingSettings, build_memories, connect, load_task, read_pairs, train
from data_owner_client.memory.rows import MemoryRows
from harness import report
from harness.datasets import home_assistant
from harness.processes import server
from protocol.cores import usable_cores
from protocol.quantization import quantize
from protocol.types import WireDtype

_WORK = report.FOLDER / "compact_rows"
_PARTS = ("train", "validation")


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer pairs and one seed")
    arguments = parser.parse_args()
    pair_count, seeds = (400, 1) if arguments.quick else (4000, 2)
    torch.set_num_threads(usable_cores())
    data = _WORK / "data"
    home_assistant.prepare(data)
    task = load_task(data / "task.toml")
    pairs = [read_pairs(data / f"{part}.jsonl") for part in _PARTS]
    exact = _WORK / f"float32-{pair_count}"
    figures: dict[str, Any] = {"pairs": pair_count, "seeds": seeds}
    with (
        server(_WORK / "server.log") as (_, grpc_port),
        connect(f"grpc://127.0.0.1:{grpc_port}", dtype="float32") as plm,
    ):
        build_memories(
            plm,
            task,
            pairs[0][:pair_count],
            exact,
            validation=pairs[1],
            context_mode="teacher-forced",
            share_targets=True,
        )
        for dtype in get_args(WireDtype):
            folder, adapter = _WORK / dtype, _WORK / "adapter"
            shutil.rmtree(folder, ignore_errors=True)
            bytes_per_row = sum(_converted(exact / part, folder / part, dtype) for part in _PARTS) / len(_PARTS)
            quick = TrainingSettings(retrieved_examples=0, selection_texts=0, minutes=0)
            reports = [train(plm, folder, adapter, settings=replace(quick, seed=seed))[1] for seed in range(seeds)]
            cards = [each.card for each in reports]
            figures[dtype] = {
                "bytes_per_row": bytes_per_row,
                "plm_nll": cards[0].validation["plm_nll"],
                "mixture_nll": mean(card.validation["mixture_nll"] for card in cards),
            }
    for dtype in get_args(WireDtype):
        figures[dtype]["loss"] = figures[dtype]["mixture_nll"] - figures["float32"]["mixture_nll"]
    report.write("compact_rows", figures)


def _converted(source: Path, target: Path, dtype: WireDtype) -> float:
    """Write a float32 memory in another format. Return its bytes per representation, scales included."""
    exact = ExternalMemory(source)
    memory = ExternalMemory.open_or_create(target, exact.manifest.plan.model_copy(update={"dtype": dtype}))
    rows = exact.load()
    cr_N_D, cr_scale_N = quantize(rows.cr_N_D, dtype, "rows")
    memory.append(
        MemoryRows(cr_N_D, rows.target_N, rows.rows_E, rows.source_tokens_E, rows.logsumexp_N, cr_scale_N=cr_scale_N)
    )
    return (cr_N_D.nbytes + (0 if cr_scale_N is None else cr_scale_N.nbytes)) / len(cr_N_D)


if __name__ == "__main__":
    main()

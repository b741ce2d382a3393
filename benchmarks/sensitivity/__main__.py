"""Sensitivity of PEMA's gain, one factor at a time: `python -m benchmarks.sensitivity`.

The measure is the gain of log-likelihood on held-out targets over the PLM, in nats per token. Each result is written at
once, so an interrupted run goes on where it was. `python -m benchmarks.findings` makes tables and pictures of them.
"""

from __future__ import annotations

import argparse
from functools import cache, partial
from itertools import groupby
from pathlib import Path

import torch

from benchmarks.in_process import model_folder, save_model, served
from benchmarks.layer_drop import layers_of, uniform_choice, without_other_layers
from benchmarks.sensitivity.measurement import Bench, Splits
from benchmarks.sensitivity.points import FACTORS, answered_points, effort_points, points
from benchmarks.sensitivity.results import FOLDER, Results
from data_owner_client import RemotePlm, load_task, read_pairs
from data_owner_client.runtime.progress import Reporter
from harness.datasets.catalogue import DATA_SETS
from plm_owner_server.engines.transformers.engine import load_model
from protocol import standard_streams
from protocol.cores import torch_threads

TASKS = ("home-assistant", "intents-en", "wordnet-classes", "cwe")
_HELD_OUT = 200


def main() -> None:
    """Measure every point that has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--task", action="append", choices=DATA_SETS, metavar="NAME", help=f"default: {', '.join(TASKS)}"
    )
    parser.add_argument("--factor", action="append", choices=FACTORS, help="only this factor; default: all")
    parser.add_argument("--value", action="append", help="only this value of the factors; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="trainings with each setting")
    parser.add_argument("--answers", action="store_true", help="also answer the test set at some points")
    parser.add_argument("--efforts", action="store_true", help="also answer the test set with each effort")
    arguments = parser.parse_args()
    standard_streams.use_utf8()
    torch.set_num_threads(torch_threads(0))
    results, tasks = Results.load(), arguments.task or TASKS
    wanted = list(points(tasks, arguments.factor or list(FACTORS), arguments.seeds, arguments.value))
    # Stable: each model is loaded once.
    wanted.sort(key=lambda point: FACTORS["model"].index(point.model))
    wanted += answered_points(tasks) if arguments.answers else ()
    wanted += effort_points(tasks) if arguments.efforts else ()
    wanted = [point for point in wanted if point not in results]
    done = 0
    for model, of_model in groupby(wanted, key=lambda point: point.model):
        with served(_folder(model)) as plm:
            bench = cache(partial(_bench, plm, model))
            for point in of_model:
                measured = bench(point.task).measure(point)
                results.add(point, measured)
                done += 1
                print(
                    f"{done}/{len(wanted)} {point.key}: {measured.gain:.4f} nats per token over the PLM's "
                    f"{measured.plm_nll:.4f}, {measured.seconds:.1f} s",
                    flush=True,
                )


def _bench(plm: RemotePlm, model: str, task: str) -> Bench:
    """The bench of a data set, which is fetched if it is not there."""
    data = FOLDER / "data" / task
    DATA_SETS[task].prepare(data)
    train, validation, test = (list(read_pairs(data / f"{part}.jsonl")) for part in ("train", "validation", "test"))
    splits = Splits(train[: max(FACTORS["pairs"])], validation[:_HELD_OUT], test[:_HELD_OUT])
    folder = FOLDER / "memories" / model.replace("/", "-") / task
    folder.mkdir(parents=True, exist_ok=True)
    return Bench(plm, load_task(data / "task.toml"), splits, folder, Reporter())


def _folder(model: str) -> Path:
    """The folder of a model of `Point.model`."""
    name, _, layers = model.partition("/")
    whole = model_folder(name)
    if not layers:
        return whole
    folder = FOLDER / "models" / model.replace("/", "-")
    if not (folder / "tokenizer.json").exists():  # written last
        full = load_model(whole, device="cpu", dtype="float32")
        numbers = uniform_choice(len(layers_of(full)), int(layers))
        save_model(without_other_layers(full, numbers), whole, folder)
    return folder


if __name__ == "__main__":
    main()

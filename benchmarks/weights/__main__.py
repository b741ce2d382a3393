"""Train a system on the weights and answer the test set: `python -m benchmarks.weights lora DATA --rows ROWS`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.in_process import model_folder
from benchmarks.weights.systems import SYSTEMS, Job, run
from plm_owner_server.settings import DEFAULT_MODEL
from protocol import standard_streams
from protocol.cores import torch_threads


def main() -> None:
    """Train the systems of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("data", type=Path, help="folder with train.jsonl, validation.jsonl, test.jsonl and task.toml")
    parser.add_argument("--rows", type=Path, required=True, help="folder for the rows of the comparison")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="the PLM; default: the server's default model")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--pairs", type=int, help="train on this many pairs; default: all")
    arguments = parser.parse_args()
    standard_streams.use_utf8()
    torch.set_num_threads(torch_threads(0))
    arguments.rows.mkdir(parents=True, exist_ok=True)
    model = model_folder(arguments.model)
    job = Job.load(arguments.data, model, arguments.pairs)
    run(arguments.system, job, model, arguments.rows, epochs=arguments.epochs)


if __name__ == "__main__":
    main()

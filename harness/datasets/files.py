"""Writing of a data set's splits and of its task."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from data_owner_client.data.tasks import Shot, Task, load_task
from data_owner_client.runtime.atomic_files import write_atomically

SourceAndTarget = tuple[str, str]
Record = Mapping[str, Any]
"""One line of a data set, in any form that the client reads."""


def is_prepared(folder: Path) -> bool:
    """Return True if the folder holds a whole data set. Its task is written last."""
    return (folder / "task.toml").exists()


def write_splits(
    folder: Path,
    *,
    train: Iterable[SourceAndTarget | Record],
    validation: Iterable[SourceAndTarget | Record],
    test: Iterable[SourceAndTarget | Record],
) -> None:
    """Write each split as JSONL."""
    for name, records in (("train", train), ("validation", validation), ("test", test)):
        lines = (json.dumps(_record(record), ensure_ascii=False) + "\n" for record in records)
        write_atomically(folder / f"{name}.jsonl", "".join(lines).encode())


def write_consecutive_splits(
    folder: Path, records: Sequence[SourceAndTarget | Record], *, train: int | None, validation: int, test: int
) -> None:
    """Write records as splits: first those to validate on, then to test on, then to train on (None: all the rest)."""
    start = validation + test
    write_splits(folder, train=records[start:][:train], validation=records[:validation], test=records[validation:start])


def write_task(path: Path, task: Task) -> None:
    """Write a task as TOML, and check that it can be loaded."""
    fields = task.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    write_atomically(path, tomli_w.dumps(fields).encode())
    load_task(path)


def shots(pairs: Sequence[SourceAndTarget]) -> tuple[Shot, ...]:
    """Pairs as in-context examples."""
    return tuple(Shot(source=source, target=target) for source, target in pairs)


def _record(record: SourceAndTarget | Record) -> Record:
    return record if isinstance(record, Mapping) else dict(zip(("source", "target"), record, strict=True))

"""Results of the sensitivity study on disk, one JSON line for each point."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Self

from benchmarks.sensitivity.measurement import Measurement
from benchmarks.sensitivity.points import Point
from harness import report

FOLDER = report.FOLDER / "sensitivity"
_PATH = FOLDER / "points.jsonl"


class Results:
    """Measurements by point; each is written as soon as it is added.

    Args:
        path: JSON Lines file.
        measurements: measurements that the file has.
        origins: date, commit and machine of each.
    """

    def __init__(
        self, path: Path, measurements: dict[Point, Measurement], origins: dict[Point, dict[str, str]]
    ) -> None:
        self._path = path
        self._measurements = measurements
        self._origins = origins

    @classmethod
    def load(cls, path: Path = _PATH) -> Self:
        """The results of a file, which need not exist. A last line that was cut off is left out."""
        measurements, origins = {}, {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole, _, rest = text.rpartition("\n")
        for line in whole.splitlines():
            record = json.loads(line)
            point = Point(**record["point"])
            measurements[point] = Measurement.model_validate(record["measurement"])
            origins[point] = record["origin"]
        if rest:
            path.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
        return cls(path, measurements, origins)

    @property
    def source(self) -> str:
        """The command, and the days, commits and machines of the measurements."""
        words = {name: sorted({each[name] for each in self._origins.values()}) for name in ("day", "commit", "machine")}
        days, commits, machines = (", ".join(values) for values in words.values())
        return f"`python -m benchmarks.sensitivity`, {days}, at {commits}, on {machines}."

    def add(self, point: Point, measurement: Measurement) -> None:
        """Append a measurement to the file."""
        self._measurements[point] = measurement
        self._origins[point] = origin = {"day": datetime.now(UTC).date().isoformat()} | _origin()
        record = {"point": asdict(point), "measurement": measurement.model_dump(), "origin": origin}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def __contains__(self, point: object) -> bool:
        return point in self._measurements

    def __getitem__(self, point: Point) -> Measurement:
        return self._measurements[point]

    def __iter__(self) -> Iterator[Point]:
        return iter(self._measurements)


@cache
def _origin() -> dict[str, str]:
    """Commit and machine of this process."""
    return {
        "commit": (report.commit() or "no commit")[:7],
        "machine": f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}",
    }

"""Where a server says that the time of a call went. It travels beside the answer, not in it: answers are repeatable."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

_METRIC = re.compile(r"\s*(\w+)\s*;\s*dur=([0-9.]+)\s*")


@dataclass(frozen=True)
class ServerTiming:
    """Milliseconds of one call.

    Attributes:
        queue_ms: waited for the model while it worked for others.
        compute_ms: the model worked on it.
        serialise_ms: all else: reading and checking the request, putting the answer together and into bytes.
    """

    queue_ms: float
    compute_ms: float
    serialise_ms: float

    @property
    def total_ms(self) -> float:
        """All of it."""
        return self.queue_ms + self.compute_ms + self.serialise_ms

    def __add__(self, other: ServerTiming) -> ServerTiming:
        """Of two calls, one after the other."""
        return ServerTiming(
            self.queue_ms + other.queue_ms,
            self.compute_ms + other.compute_ms,
            self.serialise_ms + other.serialise_ms,
        )

    def to_header(self) -> str:
        """As the value of HTTP's `Server-Timing`."""
        parts = {"queue": self.queue_ms, "compute": self.compute_ms, "serialise": self.serialise_ms}
        return ", ".join(f"{name};dur={value:.3f}" for name, value in parts.items())

    @classmethod
    def from_header(cls, value: str) -> Self | None:
        """From such a header; None if it is of another kind, as a proxy may write one, too."""
        found = {match[1]: float(match[2]) for part in value.split(",") if (match := _METRIC.fullmatch(part))}
        try:
            return cls(found["queue"], found["compute"], found["serialise"])
        except KeyError:
            return None

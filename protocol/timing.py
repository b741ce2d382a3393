"""Server's time for a call, as HTTP's `Server-Timing`. It travels beside the answer, which stays repeatable."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

_METRIC = re.compile(r"\s*(\w+)\s*;\s*dur=([0-9.]+)\s*")


@dataclass(frozen=True)
class ServerTiming:
    """The server's time for one call.

    Attributes:
        queue_ms: milliseconds that the call waited while the model worked for others.
        compute_ms: milliseconds that the model worked on the call.
        serialise_ms: milliseconds for the rest: parsing, checks, and assembling and serialising the answer.
    """

    queue_ms: float
    compute_ms: float
    serialise_ms: float

    @property
    def total_ms(self) -> float:
        """Sum of the three parts, in milliseconds."""
        return self.queue_ms + self.compute_ms + self.serialise_ms

    def __add__(self, other: ServerTiming) -> ServerTiming:
        """Sum of two calls, part by part."""
        return ServerTiming(
            self.queue_ms + other.queue_ms,
            self.compute_ms + other.compute_ms,
            self.serialise_ms + other.serialise_ms,
        )

    def to_header(self) -> str:
        """The value of HTTP's `Server-Timing`."""
        parts = {"queue": self.queue_ms, "compute": self.compute_ms, "serialise": self.serialise_ms}
        return ", ".join(f"{name};dur={value:.3f}" for name, value in parts.items())

    @classmethod
    def from_header(cls, value: str) -> Self | None:
        """Parse a `Server-Timing` header; None if it has other metrics, as one from a proxy may."""
        milliseconds = {match[1]: float(match[2]) for part in value.split(",") if (match := _METRIC.fullmatch(part))}
        try:
            return cls(milliseconds["queue"], milliseconds["compute"], milliseconds["serialise"])
        except KeyError:
            return None

"""Progress of long work, as the library reports it. By default nobody listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Bar(Protocol):
    """Progress of one piece of work."""

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """Report `steps` finished steps; the note, if any, replaces the text after the bar."""


class Reporter:
    """Reports nothing; base class of reporters that do."""

    @contextmanager
    def bar(self, description: str, total: int, unit: str, *, done: int = 0) -> Iterator[Bar]:
        """Open a bar for work of `total` steps, of which `done` were finished earlier."""
        yield _SilentBar()

    def say(self, line: str) -> None:
        """Show one line to the user."""


class _SilentBar:
    def advance(self, steps: int = 1, note: str | None = None) -> None:
        pass

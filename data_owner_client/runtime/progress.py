"""Progress reports of long work: the library is silent, the command line draws bars."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


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


class RichReporter(Reporter):
    """Draws bars with rate and remaining time on standard error."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)

    @contextmanager
    def bar(self, description: str, total: int, unit: str, *, done: int = 0) -> Iterator[Bar]:
        """Draw a bar, or print one line at the end if standard error is not a terminal."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _RateColumn(unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(description, total=total, completed=done, note="")
            yield _RichBar(progress, task)

    def say(self, line: str) -> None:
        """Print the line to standard error."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class _SilentBar:
    def advance(self, steps: int = 1, note: str | None = None) -> None:
        pass


class _RichBar:
    def __init__(self, progress: Progress, task: int) -> None:
        self._progress = progress
        self._task = task

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        fields = {} if note is None else {"note": note}
        self._progress.update(self._task, advance=steps, **fields)  # type: ignore[arg-type]


class _RateColumn(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} {self._unit}/s", style="progress.data.speed")

"""How long work reports where it is: the library is silent, the command line draws bars."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class Bar(Protocol):
    """One piece of long work."""

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """So many steps are done; the note says what they gave."""


class Reporter:
    """Reports nothing; the base of those that do."""

    @contextmanager
    def bar(self, description: str, total: int, unit: str, *, done: int = 0) -> Iterator[Bar]:
        """A piece of work of `total` steps, `done` of which were finished earlier."""
        yield _SilentBar()

    def say(self, line: str) -> None:
        """One line that the user should see."""


class RichReporter(Reporter):
    """Draws bars with rates and remaining time on standard error."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)

    @contextmanager
    def bar(self, description: str, total: int, unit: str, *, done: int = 0) -> Iterator[Bar]:
        """A bar; where standard error is no terminal, one line at the end."""
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

"""Displays of progress on standard error: bars on a terminal, else a line a minute.

Work inside other work has a bar, too. It is removed at its end, so that only the outer work leaves a line.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from data_owner_client.runtime.console import PlainConsole
from data_owner_client.runtime.progress import Bar, Reporter
from protocol import standard_streams

_INTERVAL_SECONDS = 60.0


def stderr_reporter() -> Reporter:
    """The reporter for standard error, as it is now."""
    console = PlainConsole(sys.stderr)
    # A variable such as FORCE_COLOR makes rich draw bars into files.
    if sys.stderr.isatty() and console.is_interactive:
        return BarReporter(console)
    return LineReporter(standard_streams.say)


class BarReporter(Reporter):
    """Draws bars with rate and remaining time.

    Args:
        console: console of a terminal.
    """

    def __init__(self, console: PlainConsole) -> None:
        self._console = console
        self._progress: Progress | None = None

    @contextmanager
    def bar(self, description: str, total: int, unit: str, *, done: int = 0) -> Iterator[Bar]:
        """Draw a bar, below those of the work around it."""
        outermost = self._progress is None
        progress = self._progress = self._progress or self._new_progress()
        task = progress.add_task(description, total=total, completed=done, unit=unit, note="")
        with progress if outermost else nullcontext():
            try:
                yield _ProgressBar(progress, task)
            finally:
                if outermost:
                    self._progress = None
                else:
                    progress.remove_task(task)

    def say(self, line: str) -> None:
        """Print the line, above the bars."""
        self._console.print(line, soft_wrap=True)

    def _new_progress(self) -> Progress:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        # Standard output is for results, also while a bar is drawn.
        return Progress(*columns, console=self._console, redirect_stdout=False)


class LineReporter(Reporter):
    """Writes a line a minute while work lasts, also where it hangs, and one at the end.

    Args:
        write: writes a line.
        interval_s: seconds between two lines of the same work.
        clock: a clock in seconds, for rates and times.
    """

    def __init__(
        self,
        write: Callable[[str], None],
        *,
        interval_s: float = _INTERVAL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = write
        self._interval_s = interval_s
        self._clock = clock
        self._depth = 0
        self._lock = threading.Lock()

    @contextmanager
    def bar(self, description: str, total: int, unit: str, *, done: int = 0) -> Iterator[Bar]:
        """Write lines about the work; one at the end, too, unless it is part of other work."""
        bar, ended = _LineBar(description, total, unit, done, self._clock), threading.Event()
        threading.Thread(target=self._write_regularly, args=(bar, ended), daemon=True).start()
        self._depth += 1
        try:
            yield bar
        finally:
            self._depth -= 1
            with self._lock:
                ended.set()
                if self._depth == 0:
                    self._write(bar.summary())

    def say(self, line: str) -> None:
        """Write the line."""
        with self._lock:
            self._write(line)

    def _write_regularly(self, bar: _LineBar, ended: threading.Event) -> None:
        while not ended.wait(self._interval_s):
            with self._lock:
                if not ended.is_set():
                    self._write(bar.line())


class _ProgressBar:
    def __init__(self, progress: Progress, task: int) -> None:
        self._progress = progress
        self._task = task

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        fields = {} if note is None else {"note": note}
        self._progress.update(self._task, advance=steps, **fields)  # type: ignore[arg-type]


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_rate(task.finished_speed or task.speed, task.fields["unit"]), style="progress.data.speed")


class _LineBar:
    def __init__(self, description: str, total: int, unit: str, done: int, clock: Callable[[], float]) -> None:
        self._description = description
        self._total = total
        self._unit = unit
        self._before = self._done = done
        self._clock = clock
        self._started = clock()
        self._note = ""

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        self._done += steps
        self._note = self._note if note is None else note

    def line(self) -> str:
        """The progress so far: steps, rate and remaining time."""
        rate = self._steps_per_s()
        left = f"{_duration((self._total - self._done) / rate)} left" if rate else ""
        return self._joined(self._steps(), _rate(rate, self._unit), left, self._note)

    def summary(self) -> str:
        """The progress at the end: steps, duration and rate."""
        steps = f"{self._steps()} in {_duration(self._clock() - self._started)}"
        return self._joined(steps, _rate(self._steps_per_s(), self._unit), self._note)

    def _steps(self) -> str:
        return f"{self._done:,} of {self._total:,} {self._unit}"

    def _steps_per_s(self) -> float | None:
        """The rate since the bar was opened; None if there is none yet."""
        seconds = self._clock() - self._started
        return (self._done - self._before) / seconds if seconds > 0 and self._done > self._before else None

    def _joined(self, *parts: str) -> str:
        return f"{self._description}: {', '.join(filter(None, parts))}"


def _rate(steps_per_s: float | None, unit: str) -> str:
    """The rate in words, by the minute if it is low; empty if it is unknown."""
    if steps_per_s is None:
        return ""
    return f"{steps_per_s:,.1f} {unit}/s" if steps_per_s >= 1 else f"{60 * steps_per_s:,.1f} {unit}/min"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))

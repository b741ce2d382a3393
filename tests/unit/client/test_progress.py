"""Displays of progress: lines without a terminal, bars on one, and every text as it is."""

from __future__ import annotations

import io
import sys
import threading

import pytest

from data_owner_client.runtime.console import PlainConsole
from data_owner_client.runtime.progress_display import BarReporter, LineReporter, stderr_reporter

PATIENCE_SECONDS = 60


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class Lines(list[str]):
    """Lines written by another thread; they can be awaited."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()

    def write(self, line: str) -> None:
        with self._changed:
            self.append(line)
            self._changed.notify_all()

    def wait_for(self, line: str, number: int = 1) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.count(line) >= number, PATIENCE_SECONDS)


def test_a_line_has_done_rate_and_time_left_also_where_nothing_advances() -> None:
    lines, clock = Lines(), Clock()
    reporter = LineReporter(lines.write, interval_s=1e-3, clock=clock)
    with reporter.bar("memory m[draft]", 90_000, "examples", done=30_000) as bar:
        lines.wait_for("memory m[draft]: 30,000 of 90,000 examples", 2)
        clock.seconds += 600
        bar.advance(12_000, "1,000 rows")
        lines.wait_for("memory m[draft]: 42,000 of 90,000 examples, 20.0 examples/s, 0:40:00 left, 1,000 rows")
    assert lines[-1] == "memory m[draft]: 42,000 of 90,000 examples in 0:10:00, 20.0 examples/s, 1,000 rows"


def test_a_low_rate_is_told_by_the_minute() -> None:
    lines, clock = Lines(), Clock()
    with LineReporter(lines.write, clock=clock).bar("generating", 4, "sequences") as bar:
        clock.seconds += 120
        bar.advance(4)
    assert lines == ["generating: 4 of 4 sequences in 0:02:00, 2.0 sequences/min"]


def test_the_end_is_told_once_also_after_a_failure() -> None:
    lines = Lines()

    def work() -> None:
        with LineReporter(lines.write, clock=Clock()).bar("work", 3, "steps") as bar:
            bar.advance()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert lines == ["work: 1 of 3 steps in 0:00:00"]


def test_no_line_of_a_bar_comes_after_its_end() -> None:
    lines = Lines()
    reporter = LineReporter(lines.write, interval_s=1e-4, clock=Clock())
    for number in range(20):
        with reporter.bar(f"work {number}", 1, "steps") as bar:
            bar.advance()
    reporter.say("the end")
    names = [line.partition(":")[0] for line in lines]
    assert list(dict.fromkeys(names)) == [*(f"work {number}" for number in range(20)), "the end"]
    assert lines[-1] == "the end"
    assert all(" in 0:00:00" in lines[names.index(f"work {number + 1}") - 1] for number in range(19))


def test_work_inside_work_tells_its_progress_but_not_its_end() -> None:
    lines = Lines()
    reporter = LineReporter(lines.write, interval_s=1e-3)
    with reporter.bar("out.txt", 2, "texts") as outer:
        for number in (1, 2):
            with reporter.bar("generating", 5, "sequences"):
                lines.wait_for("generating: 0 of 5 sequences", number)
            outer.advance()
    assert not [line for line in lines if line.startswith("generating") and " in " in line]
    assert lines[-1].startswith("out.txt: 2 of 2 texts in ")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return io.StringIO()


def last_line(terminal: io.StringIO) -> str:
    """The last line that was drawn, before the cursor is shown again."""
    return terminal.getvalue().removesuffix("\x1b[?25h").splitlines()[-1]


def test_bars_show_texts_as_they_are(terminal: io.StringIO) -> None:
    reporter = BarReporter(PlainConsole(terminal))
    with reporter.bar("memory m[draft] a[/b] :heart:", 10, "examples") as bar:
        reporter.say("Says [red]this[/red].")
        bar.advance(10, "[/note]")
    shown = terminal.getvalue()
    assert "memory m[draft] a[/b] :heart:" in shown
    assert "Says [red]this[/red]." in shown
    assert "[/note]" in last_line(terminal)
    assert "10/10" in last_line(terminal)


def test_inner_bars_are_drawn_below_the_outer_one_and_removed(terminal: io.StringIO) -> None:
    reporter = BarReporter(PlainConsole(terminal))
    with reporter.bar("outer", 3, "texts") as outer:
        for number in range(3):
            with reporter.bar(f"inner {number}", 1, "steps") as inner:
                inner.advance()
            outer.advance()
    assert "inner" not in last_line(terminal)
    assert "3/3" in last_line(terminal)
    with reporter.bar("the next", 1, "texts"):
        pass
    assert "the next" in last_line(terminal)


def test_results_pass_a_bar_by(terminal: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    with BarReporter(PlainConsole(terminal)).bar("work", 1, "steps"):
        sys.stdout.write("result [x]\n")
    assert capsys.readouterr().out == "result [x]\n"
    assert "result" not in terminal.getvalue()


@pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1", "TERM": "xterm"}])
def test_without_a_terminal_there_are_lines(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with stderr_reporter().bar("work [/b]", 2, "steps") as bar:
        for _ in range(2):
            bar.advance()
    assert stream.getvalue().startswith("work [/b]: 2 of 2 steps in ")
    assert stream.getvalue().count("\n") == 1

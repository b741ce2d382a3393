"""Tables and lines on the standard streams, with every text as it is."""

from __future__ import annotations

import sys
from typing import IO

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

# Wider than any table. Readers of a pipe or a file want whole values, and not the width of a terminal.
_UNBOUNDED = 100_000


class PlainConsole(Console):
    """A console that reads no markup and no emoji names in texts, such as paths with square brackets.

    Args:
        file: stream that it writes to. Default: standard output.
    """

    def __init__(self, file: IO[str] | None = None) -> None:
        super().__init__(file=file or sys.stdout, markup=False, emoji=False, highlight=False)

    def on_broken_pipe(self) -> None:
        """Leave it to the caller that the reader of the output has gone."""
        raise BrokenPipeError


def print_table(table: Table, *lines: str) -> None:
    """Print a table to standard output, and lines below it. No value is cut: a terminal gets longer ones folded."""
    for column in table.columns:
        column.overflow = "fold"
    console = PlainConsole()
    if not console.is_terminal:
        console.width = _UNBOUNDED
        table.min_width = max(cell_len(str(text or "")) for text in (table.title, table.caption))
    console.print(table)
    for line in lines:
        console.print(line, soft_wrap=True)

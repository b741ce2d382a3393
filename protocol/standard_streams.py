"""Standard output and standard error of both command lines."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress


def use_utf8() -> None:
    """Write UTF-8 to pipes and files, whatever the locale; a terminal keeps its encoding.

    A character that the encoding lacks becomes a question mark. So do the bytes of a path that are not UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")


def say(line: str) -> None:
    """Print a line to standard error. If nobody reads it any longer, the work goes on without."""
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        flush()


def flush() -> None:
    """Flush both streams. If the reader of one, such as `head`, has gone, send the rest nowhere."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            with suppress(OSError):  # no file, but a buffer
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

"""Standard output and standard error of both command lines."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TextIO


def use_utf8() -> None:
    """Write UTF-8 to pipes and files, whatever the locale; a terminal keeps its encoding.

    A character that the encoding lacks becomes a question mark. So do the bytes of a path that are not UTF-8. What goes
    to a stream that the caller has closed goes nowhere.
    """
    sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def fault_of(error: OSError) -> str:
    """The fault of a file or a stream in words, such as those of a full disk."""
    what = error.strerror or str(error)
    where = f"{error.filename}" if error.filename is not None else "standard output or a file"
    return f"{where} cannot be used: {what}. Make room or choose another place."


def say(line: str) -> None:
    """Print a line to standard error. If nobody reads it any longer, the work goes on without."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        flush()


def flush() -> None:
    """Flush both streams. If one takes no more, as its reader (such as `head`) has gone, send the rest nowhere."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):  # no file, but a buffer
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

"""Text of the other side, or of its templates, as it may be shown on a terminal."""

from __future__ import annotations

_LONGEST_TEXT = 2000


def printable_line(text: object, longest: int = _LONGEST_TEXT) -> str:
    """A text as one line, without characters that would control a terminal.

    Args:
        text: the text, or an error with it.
        longest: characters that are shown; the others are left out.
    """
    printable = "".join(each if each.isprintable() else " " for each in str(text)[:longest])
    return " ".join(printable.split())

"""Spans of a text, and the finders of those that a data owner keeps to itself."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from protocol.errors import InvalidData

BUILTIN_PATTERNS = {
    "numbers": r"\d+(?:[.,]\d+)*",
    "dates": r"\b(?:\d{4}([-./])\d{1,2}\1\d{1,2}|\d{1,2}([-./])\d{1,2}\2\d{2,4})\b",
    "emails": r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
    "urls": r"(?:(?<=https://)|(?<=http://)|\bwww\.)[^\s<>\"]+",
}
"""Regular expressions of kinds that many texts have, by name. A URL is redacted behind its `http://`."""

# A word with its combining marks, or a sign of its own.
_PIECE = re.compile(r"(?:\w[\u0300-\u036f]*)+|[^\w\s]")


class Span(NamedTuple):
    """A part of a text.

    Attributes:
        start: index of its first character.
        end: index behind its last character.
        kind: kind of what it is, such as `name`.
    """

    start: int
    end: int
    kind: str


Finder = Callable[[str], Iterable[Sequence[Any]]]
"""Finds spans of a text, as (start, end, kind); they may overlap."""


class TermFinder:
    """Finds words and phrases of a list: as whole words, in upper or lower case, with any white space between them.

    Args:
        terms: words and phrases, without blank ones.
        kind: kind of their spans.
    """

    def __init__(self, terms: Iterable[str], kind: str = "word") -> None:
        self._kind = kind
        self._phrases: dict[str, set[tuple[str, ...]]] = {}
        for term in terms:
            if pieces := tuple(piece for piece, _, _ in _pieces(term)):
                self._phrases.setdefault(pieces[0], set()).add(pieces)

    def __call__(self, text: str) -> Iterator[Span]:
        """Yield the longest phrase at each place."""
        pieces = list(_pieces(text))
        for at, (piece, start, _) in enumerate(pieces):
            lengths = [
                len(phrase)
                for phrase in self._phrases.get(piece, ())
                if phrase == tuple(each for each, _, _ in pieces[at : at + len(phrase)])
            ]
            if lengths:
                yield Span(start, pieces[at + max(lengths) - 1][2], self._kind)


class PatternFinder:
    """Finds the matches of a regular expression.

    Args:
        regex: the expression; see Python's `re`.
        kind: kind of the spans.

    Raises:
        re.error: this is no regular expression.
    """

    def __init__(self, regex: str, kind: str) -> None:
        self._pattern = re.compile(regex)
        self._kind = kind

    def __call__(self, text: str) -> Iterator[Span]:
        """Yield all matches."""
        return (Span(match.start(), match.end(), self._kind) for match in self._pattern.finditer(text))


def find_spans(text: str, finders: Iterable[Finder]) -> list[Span]:
    """The spans of all finders, in order. Those that overlap become one, of the kind of the longest.

    Raises:
        InvalidData: a finder gives something else than spans of the text.
    """
    found = sorted(
        (span for finder in finders for each in finder(text) if (span := _trimmed(text, each))),
        key=lambda span: (span.start, -span.end, span.kind),
    )
    merged, longest = list[Span](), 0
    for span in found:
        if merged and span.start < merged[-1].end:
            last = merged[-1]
            kind = span.kind if span.end - span.start > longest else last.kind
            longest = max(longest, span.end - span.start)
            merged[-1] = Span(last.start, max(last.end, span.end), kind)
        else:
            longest = span.end - span.start
            merged.append(span)
    return merged


def _trimmed(text: str, found: Sequence[Any]) -> Span | None:
    """The span without white space around it; None if nothing is left."""
    try:
        start, end, kind = found
        is_span = 0 <= int(start) <= int(end) <= len(text) and isinstance(kind, str)
    except (TypeError, ValueError):
        is_span = False
    if not is_span:
        raise InvalidData(
            f"A redactor found {found!r:.80} in a text of {len(text):,} characters.",
            hint="It must give (start, end, kind) for each span, as indices of characters and a text.",
        )
    part = text[start:end]
    start, end = start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())
    return Span(start, end, kind) if start < end else None


def _pieces(text: str) -> Iterator[tuple[str, int, int]]:
    """The words and signs of a text in a form that is compared, with their ends."""
    for match in _PIECE.finditer(text):
        yield unicodedata.normalize("NFKC", match.group()).casefold(), match.start(), match.end()

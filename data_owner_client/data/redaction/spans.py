"""Spans of a text, and the finders of those that a data owner keeps to itself."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import index
from typing import Any, NamedTuple

from protocol.errors import InvalidData

BUILTIN_PATTERNS = {
    "numbers": r"\d+(?:[.,]\d+)*",
    "dates": r"(?<!\d)(?:\d{4}([-./])\d{1,2}\1\d{1,2}|\d{1,2}([-./])\d{1,2}\2\d{2,4})(?!\d)",
    # Bounded, as an unbounded part is searched again from each of its characters.
    "emails": r"[\w.+%&'-]{1,256}@[\w-]+(?:\.[\w-]+)+",
    "urls": r"(?:(?<=://)|\b(?i:www)\.)[^\s<>\"]+",
}
"""Regular expressions of kinds that many texts have, by name. A URL is redacted behind its scheme, such as `http://`."""

# Scripts that write words without space between them, or, as Korean, with particles behind them: from Thai to Burmese,
# Khmer, Chinese, Japanese and Korean. Each of their characters is a piece.
_UNSPACED = (
    "\u0e00-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uac00-\ud7a3\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
# Vowel points and invisible signs, which texts have or lack in the same word.
_OPTIONAL = "\u00ad\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0640\u064b-\u065f\u0670\u200c\u200d\u2060"
_MARKS = f"\u0300-\u036f\u3099\u309a\uff9e\uff9f{_OPTIONAL}"
# A syllable of single Korean letters, a character of such a script, a word with its combining marks, or a sign of its
# own. An underscore and an apostrophe that counts as a letter are signs. An invisible space is space.
_PIECE = re.compile(
    "[\u1100-\u115f][\u1160-\u11a7]?[\u11a8-\u11ff]?"
    f"|[{_UNSPACED}][{_MARKS}]*"
    f"|(?:[^\\W_\u02bc\u1100-\u11ff{_UNSPACED}][{_MARKS}]*)+"
    "|[^\\w\\s\u200b\ufeff]|[_\u02bc]"
)
_IGNORED = re.compile(f"[{_OPTIONAL}]")
# Signs that are written for each other. Both Turkish pairs of i fold to one letter.
_SAME = str.maketrans({**dict.fromkeys("‘’ʼ`´′", "'"), **dict.fromkeys("‐‑‒–—−", "-"), "ı": "i"})


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

    In scripts that write no space between words, a term is found within other text. Kinds of apostrophes and dashes are
    the same, and invisible signs and vowel points count as nothing.

    Args:
        terms: words and phrases, without blank ones.
        kind: kind of their spans.
    """

    def __init__(self, terms: Iterable[str], kind: str = "word") -> None:
        self._kind = kind
        self._phrases = set[tuple[str, ...]]()
        lengths: dict[str, set[int]] = {}
        for term in terms:
            if pieces := tuple(piece for piece, _, _ in _pieces(term)):
                self._phrases.add(pieces)
                lengths.setdefault(pieces[0], set()).add(len(pieces))
        self._lengths = {first: sorted(each, reverse=True) for first, each in lengths.items()}

    def __call__(self, text: str) -> Iterator[Span]:
        """Yield the longest phrase at each place."""
        pieces = list(_pieces(text))
        for at, (piece, start, _) in enumerate(pieces):
            for length in self._lengths.get(piece, ()):
                if tuple(each for each, _, _ in pieces[at : at + length]) in self._phrases:
                    yield Span(start, pieces[at + length - 1][2], self._kind)
                    break


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
        start, end, kind = index(found[0]), index(found[1]), found[2]
        is_span = len(found) == 3 and 0 <= start <= end <= len(text) and isinstance(kind, str)
    except (TypeError, LookupError):
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
        yield _folded(match.group()), match.start(), match.end()


def _folded(piece: str) -> str:
    """The piece in a form that is compared. A piece of invisible signs alone stays."""
    bare = _IGNORED.sub("", piece) or piece
    folded = unicodedata.normalize("NFKC", bare.translate(_SAME)).casefold()
    return folded.replace("i\u0307", "i").translate(_SAME)

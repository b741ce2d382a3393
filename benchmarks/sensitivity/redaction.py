"""A redaction of a quarter of all words, whatever they are, to compare redacted memories with shared ones."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

# Keys of JSON objects, which stand in front of a colon, and names of intents are in the task's schema: no secrets.
_WORD = re.compile(r'\b(?!Hass[A-Z])\w+(?![^"]*"\s*:)')


def a_quarter_of_words(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield the words of a quarter of the vocabulary, the same ones in all texts, as (start, end, kind)."""
    for match in _WORD.finditer(text):
        if zlib.crc32(match.group().casefold().encode()) % 4 == 0:
            yield match.start(), match.end(), "word"

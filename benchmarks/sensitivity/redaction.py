"""A redaction of a quarter of all words, whatever they are, to compare redacted memories with shared ones."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

# A key of a JSON object stands in front of its colon. Keys are no secret, as the task's schema has them.
_WORD_THAT_IS_NO_KEY = re.compile(r'\w+(?![^"]*"\s*:)')


def a_quarter_of_words(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield the words of a quarter of the vocabulary, the same ones in all texts, as (start, end, kind)."""
    for match in _WORD_THAT_IS_NO_KEY.finditer(text):
        if zlib.crc32(match.group().casefold().encode()) % 4 == 0:
            yield match.start(), match.end(), "word"

"""Scripts of characters, and tokens of a text in any script."""

from __future__ import annotations

import unicodedata
from functools import cache
from itertools import groupby

SPACED = "spaced"
"""Scripts that put spaces between words; Hangul, which does as well, has a name of its own."""
UNSPACED = "unspaced"
"""Scripts of South-East Asia and Tibet without spaces between words."""
# First words of the characters' Unicode names. Other letters belong to scripts that put spaces between words.
_SCRIPTS = {
    "CJK": "Han",
    "IDEOGRAPHIC": "Han",
    "HIRAGANA": "kana",
    "KATAKANA": "kana",
    "HALFWIDTH KATAKANA": "kana",
    "HANGUL": "Hangul",
    "HALFWIDTH HANGUL": "Hangul",
    **dict.fromkeys(("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"), UNSPACED),
}
_WITHOUT_SPACES = frozenset({"Han", "kana", UNSPACED})


@cache
def script_of(character: str) -> str:
    """The script of a character; empty for digits, punctuation and spaces."""
    name = unicodedata.name(character, "")
    script = next((script for prefix, script in _SCRIPTS.items() if name.startswith(prefix)), "")
    return script or (SPACED if character.isalpha() else "")


def tokens_of(text: str) -> list[str]:
    """The tokens of a text between spaces; single characters where scripts have no spaces."""
    tokens = list[str]()
    for kind, run in groupby(text, _kind):
        characters = list(run)
        tokens += {"character": characters, "word": ["".join(characters)]}.get(kind, [])
    return tokens


def words_of(text: str) -> list[str]:
    """The tokens of a text without anything but letters, marks and digits."""
    return tokens_of("".join(character if _is_in_words(character) else " " for character in text))


@cache
def _kind(character: str) -> str:
    if character.isspace():
        return ""
    alone = script_of(character) in _WITHOUT_SPACES and unicodedata.category(character)[0] in "LM"
    return "character" if alone else "word"


@cache
def _is_in_words(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN"

"""Surrogates of spans: texts of the same shape and length, drawn with a secret key."""

from __future__ import annotations

import hashlib
import hmac
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice

from data_owner_client.data.redaction.spans import TermFinder
from data_owner_client.plm.tokenizer import PlmTokenizer

# Surrogates among which the one with the span's token boundaries is searched.
_TRIES = 64
# Draws until a surrogate differs from its span; a single digit is drawn again in a tenth of them.
_MOST_DRAWS = 1000
# Vowels and consonants alternate, as in most names.
_ALPHABETS = {
    "LATIN": ("aeiou", "bcdfghjklmnpqrstvwxyz"),
    "CYRILLIC": ("аеиоуыюя", "бвгджзклмнпрстфхцчш"),
    "GREEK": ("αεηιου", "βγδζθκλμνπρστφχψ"),
}
_NEIGHBOURS = 64


def _rows(encoding: str, first: int, last: int) -> str:
    """The characters of some rows of an East Asian character set."""
    places = [bytes((row, cell)) for row in range(first, last + 1) for cell in range(0xA1, 0xFF)]
    return "".join(place.decode(encoding, errors="ignore") for place in places)


# The 3,755 most usual Chinese characters, and 2,350 usual Korean syllables. Neighbours of a character have the same
# radical or initial, by which names could be guessed.
_USUAL = {"CJK": _rows("gb2312", 0xB0, 0xD7), "HANGUL": _rows("euc_kr", 0xB0, 0xC8)}


class SurrogateMap:
    """The surrogate of each span: always the same one under the same key and tokenizer, and never the span itself.

    A surrogate has a digit for each digit, a letter of the same script and case for each letter, a vowel sign of the
    same script for each vowel sign, and everything else unchanged. So it is as long as its span, in characters.

    Args:
        key: secret key. Without it, nobody can check a guess of a span.
        tokenizer: tokenizer for which the token boundaries of span and surrogate shall agree; None for any.
        terms: words and phrases that no surrogate may have.
    """

    def __init__(self, key: bytes, tokenizer: PlmTokenizer | None, terms: TermFinder) -> None:
        self._key = key
        self._tokenizer = tokenizer
        self._terms = terms
        self._found: dict[str, str] = {}

    def __getitem__(self, span: str) -> str:
        """The surrogate of a span."""
        if span not in self._found:
            self._found[span] = self._find(span)
        return self._found[span]

    def _find(self, span: str) -> str:
        candidates = self._candidates(span)
        if self._tokenizer is None:
            return next(candidates, None) or masked(span)
        starts, best, least = _token_starts(self._tokenizer, span), masked(span), len(span) + 1
        for candidate in islice(candidates, _TRIES):
            if (misfit := len(starts ^ _token_starts(self._tokenizer, candidate))) < least:
                best, least = candidate, misfit
            if not least:
                break
        return best

    def _candidates(self, span: str) -> Iterator[str]:
        for number in range(_MOST_DRAWS):
            drawn = draw(self._key, span, number)
            if drawn.casefold() != span.casefold() and not any(self._terms(drawn)):
                yield drawn


def masked(span: str) -> str:
    """A surrogate of signs alone, for spans without letters or digits."""
    return "".join(sign if sign.isspace() else "*" if sign == "#" else "#" for sign in span)


def draw(key: bytes, span: str, number: int) -> str:
    """Draw a text of the span's shape; it may be the span itself.

    Args:
        key: secret key.
        span: text to replace.
        number: number of the draw.
    """
    random, drawn = _random_numbers(key, span, number), list[str]()
    is_vowel: bool | None = None  # of the previous letter of the same word
    for at, sign in enumerate(span):
        options, after = _options(sign), None
        if sign.isdecimal():
            # A number that begins without zeros goes on doing so: it may be part of JSON.
            begins = not span[at - 1 : at].isdecimal() and span[at + 1 : at + 2].isdecimal()
            options = options[1:] if begins and unicodedata.decimal(sign) else options
        elif len(parts := _vowels_and_consonants(sign)) == 2:
            after = not is_vowel if is_vowel is not None else next(random) % 3 == 0
            options = parts[0 if after else 1]
        is_vowel = after
        drawn.append(options[next(random) % len(options)])
    return "".join(drawn)


def _random_numbers(key: bytes, span: str, number: int) -> Iterator[int]:
    """HMAC-SHA256 in counter mode, in numbers of 32 bits."""
    block = 0
    while True:
        data = hmac.digest(key, f"{number}:{block}:{span}".encode(), hashlib.sha256)
        yield from (int.from_bytes(data[at : at + 4], "big") for at in range(0, len(data), 4))
        block += 1


@lru_cache(maxsize=4096)
def _vowels_and_consonants(letter: str) -> Sequence[str]:
    """Both in the letter's script and case; empty for scripts without them."""
    if not letter.isalpha() or not (letter.isupper() or letter.islower()):
        return ()
    parts = _ALPHABETS.get(_script(letter), ())
    return [part.upper() for part in parts] if letter.isupper() else parts


@lru_cache(maxsize=4096)
def _options(sign: str) -> str:
    """Signs that may stand for this one; the sign alone if there are none."""
    if sign.isdecimal():
        zero = ord(sign) - unicodedata.decimal(sign)
        return "".join(map(chr, range(zero, zero + 10)))
    category = unicodedata.category(sign)
    # Vowel signs of scripts such as Hindi's and Thai; an accent or a variation selector goes with any letter.
    is_vowel_sign = category in ("Mn", "Mc") and _script(sign) not in ("COMBINING", "VARIATION")
    if category[0] not in "LN" and not is_vowel_sign:
        return sign
    if category == "Lo" and sign >= "\u3400" and (usual := _USUAL.get(_script(sign))):
        return usual
    first = ord(sign) - ord(sign) % _NEIGHBOURS
    near = map(chr, range(first, first + _NEIGHBOURS))
    return "".join(one for one in near if unicodedata.category(one) == category and _script(one) == _script(sign))


def _script(sign: str) -> str:
    return unicodedata.name(sign, "").split(" ")[0].split("-")[0]


def _token_starts(tokenizer: PlmTokenizer, span: str) -> frozenset[int]:
    """Characters with which tokens of a span begin, where it follows a space."""
    return frozenset(tokenizer.starts(tokenizer.encode_continuation(f" {span}")))

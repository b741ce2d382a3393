"""The ends of an answer, as texts and as token ids.

A stop text may span tokens and stand inside one, so it is searched in the text of the tokens, not among their ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from data_owner_client.data.reading.problems import require_unicode
from data_owner_client.plm.tokenizer import PlmTokenizer
from protocol.errors import InvalidData

_NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"
# Stop tokens sent with each call. A newline is in some hundred tokens of a large vocabulary, a space in most.
_MAX_DRAFTING_STOPS = 4096
# Most tokens of one character: the bytes of its UTF-8 form.
_TOKENS_PER_CHARACTER = 4


@dataclass(frozen=True)
class Stops:
    """The ends of an answer.

    An answer ends at a token of `ids`, or before the first of `texts` that its text contains.
    A text may span tokens, and may begin or end inside a token.
    """

    texts: tuple[str, ...] = ()
    ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for text in self.texts:
            require_unicode(text, "a stop")
        if "" in self.texts:
            raise InvalidData("A stop text is empty.", hint="Leave it out.")

    def with_texts(self, texts: Iterable[str]) -> Stops:
        """The stops with further texts."""
        return Stops((*self.texts, *texts), self.ids)


class StopMatcher:
    """Finds the end of a growing answer by its stops.

    An answer ends at the first token behind which its text contains a stop text, and at each token of `ids`.

    Args:
        tokenizer: the PLM's tokenizer.
        stops: ends of the answer.
    """

    def __init__(self, tokenizer: PlmTokenizer, stops: Stops) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._longest = max(map(len, stops.texts), default=0)

    @cached_property
    def ids(self) -> frozenset[int]:
        """Ids of the tokens that end an answer whatever stands before them.

        These are the ids of the stops, and the tokens whose own text contains a stop text. A stop text that no token
        contains adds none.
        """
        return self._stops.ids.union(*map(self._tokenizer.ids_containing, self._stops.texts))

    @property
    def drafting_ids(self) -> frozenset[int]:
        """Ids of the tokens behind which the server need not draft. Which of them it knows never changes a text."""
        return self.ids if len(self.ids) <= _MAX_DRAFTING_STOPS else self._stops.ids

    def ends(self, token_ids: Sequence[int]) -> bool:
        """Return True if the last token ends an answer that had no end before it."""
        if token_ids[-1] in self.ids:
            return True
        return bool(self._stops.texts) and self._in_text(token_ids)

    def end(self, token_ids: Sequence[int]) -> int | None:
        """Index of the token that ends the answer; None if it has no end."""
        return next((at for at in range(len(token_ids)) if self.ends(token_ids[: at + 1])), None)

    def text(self, token_ids: Sequence[int]) -> str:
        """The answer's text up to its end, which may be missing; without special tokens."""
        ids = list(token_ids)
        if ids and ids[-1] in self._stops.ids:
            ids.pop()
        text = self._tokenizer.decode_continuation(ids)
        at = self._find(text)
        if at is None and ids and ids[-1] in self.ids:
            # Half characters before it can hide a stop that the token's own text contains.
            return self._tokenizer.decode_continuation(ids[:-1])
        return text[:at]

    def settled_text(self, token_ids: Sequence[int]) -> str:
        """The beginning of the text that no further token changes.

        The rest may become a stop text, or belongs to a character that is not whole.
        """
        text = self.text(token_ids)
        if self.ends(token_ids):
            return text
        if self._half_character is not None:
            text = _common_prefix(text, self._tokenizer.decode_continuation([*token_ids, self._half_character]))
        text = text.rstrip(_NO_CHARACTER)
        return text[: len(text) - self._beginning_of_stop(text)]

    @cached_property
    def _half_character(self) -> int | None:
        """A token that holds a part of a character; None if the vocabulary has none."""
        return min(self._tokenizer.ids_containing(_NO_CHARACTER), default=None)

    def _in_text(self, token_ids: Sequence[int]) -> bool:
        """Return True if the text contains a stop text, which earlier tokens did not complete.

        Only the last tokens are decoded, unless these do not tell. A token has at least one byte of text, except for
        special tokens. So all but the last four hold the stop's other characters, and one that decoding may strip.
        """
        tail = list(token_ids[-_TOKENS_PER_CHARACTER * (self._longest + 2) :])
        text = self._tokenizer.decode_continuation(tail)
        if len(tail) < len(token_ids):
            before = self._tokenizer.decode_continuation(tail[:-_TOKENS_PER_CHARACTER])
            if _NO_CHARACTER in text or len(before) <= self._longest or self._find(text) is not None:
                text = self._tokenizer.decode_continuation(list(token_ids))
        return self._find(text) is not None

    def _find(self, text: str) -> int | None:
        """Index of the first stop text; None if there is none."""
        return min((at for stop in self._stops.texts if (at := text.find(stop)) >= 0), default=None)

    def _beginning_of_stop(self, text: str) -> int:
        """Number of characters at the end of the text that may become a stop text."""
        return next(
            (
                size
                for size in range(min(self._longest - 1, len(text)), 0, -1)
                if any(stop.startswith(text[-size:]) for stop in self._stops.texts)
            ),
            0,
        )


def _common_prefix(text: str, other: str) -> str:
    return text[: next((at for at, pair in enumerate(zip(text, other, strict=False)) if len({*pair}) > 1), len(text))]

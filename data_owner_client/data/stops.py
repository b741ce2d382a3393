"""The ends of an answer, as texts and as token ids."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stops:
    """The ends of an answer.

    An answer ends at a token of `ids`, or before the first of `texts` that its text contains.
    A text may span tokens, and may begin or end inside a token.
    """

    texts: tuple[str, ...] = ()
    ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if "" in self.texts:
            raise ValueError("A stop text is empty; leave it out.")

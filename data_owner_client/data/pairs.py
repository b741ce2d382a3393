"""Pairs of a text or conversation and its answer: their split for validation, and their digest."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

from data_owner_client.data.reading.problems import Origin, require_unicode
from data_owner_client.runtime.arguments import require_loaded
from protocol.chat_template import ChatMessage
from protocol.errors import InvalidData


@dataclass(frozen=True)
class Conversation:
    """A conversation up to the turn that is answered.

    Attributes:
        turns: messages with `role` and `content`, and whatever else a chat template reads; the last one is answered.
        tools: JSON schemas of the tools that it may use; None for none.
    """

    turns: tuple[ChatMessage, ...]
    tools: tuple[ChatMessage, ...] | None = None


Source = str | Conversation
"""Input of a task: a text, or a conversation."""


@dataclass(frozen=True)
class Pair:
    """A source and its target.

    Attributes:
        source: the source text; of a conversation, the text of the turn that is answered.
        target: the target text; None if there are only sources.
        origin: where the pair was read; None if it comes from no file. Pairs are equal whatever their origins.
        conversation: the conversation up to the source; None where the source stands alone.
        reply: the assistant's message, where it has more than the text in `target`, such as tool calls; else None.
        references: further right answers beside the target.
        group: name that all pairs of one record have in common, such as a conversation; validation takes all or none
            of them. Empty for a pair that is alone.

    Raises:
        InvalidData: a text is no `str`, or cannot be encoded as UTF-8.
    """

    source: str
    target: str | None = None
    origin: Origin | None = field(default=None, compare=False, repr=False)
    conversation: Conversation | None = None
    reply: ChatMessage | None = None
    references: tuple[str, ...] = ()
    group: str = ""

    @property
    def question(self) -> Source:
        """The conversation, or else the source text."""
        return self.conversation or self.source

    def __post_init__(self) -> None:
        require_unicode(self.source, "the source", self.origin)
        if self.target is not None:
            require_unicode(self.target, "the target", self.origin)


def list_of_pairs(pairs: Iterable[Pair]) -> Sequence[Pair]:
    """The pairs of one call as a sequence.

    Raises:
        InvalidData: there is a path in their place, or something else than a pair among them.
    """
    require_loaded(pairs, "The list of pairs", "read_pairs(path)")
    if isinstance(pairs, Sequence) and not isinstance(pairs, (list, tuple)):
        return pairs  # a file of pairs, which may be larger than memory
    pairs = list(pairs)
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, Pair):
            raise InvalidData(f"pair {number} is a {type(pair).__name__}.", hint="Give Pair(source, target).")
    return pairs


class PairSelection(Sequence[Pair]):
    """Some pairs of a sequence, which stay where they are.

    Args:
        pairs: the whole sequence.
        index_N: indices of the selected pairs, in ascending order.
    """

    def __init__(self, pairs: Sequence[Pair], index_N: Sequence[int]) -> None:
        self._pairs = pairs
        self._index_N = index_N

    def __len__(self) -> int:
        return len(self._index_N)

    def __iter__(self) -> Iterator[Pair]:
        """Iterate over the selected pairs in one pass over the whole sequence."""
        selected = iter(self._index_N)
        wanted = next(selected, None)
        for number, pair in enumerate(self._pairs):
            if number == wanted:
                yield pair
                wanted = next(selected, None)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | Sequence[Pair]:
        if isinstance(index, slice):
            return PairSelection(self._pairs, self._index_N[index])
        return self._pairs[self._index_N[index]]


def split_validation(
    pairs: Sequence[Pair], fraction: float, max_sources: int = 300
) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """Set some pairs aside for validation, at least one. A hash of the source decides, so equal sources stay together.

    Args:
        pairs: all pairs.
        fraction: share of the pairs to set aside, 0 to 1.
        max_sources: upper bound of the distinct sources that are set aside.

    Returns:
        The pairs to train on, and the pairs set aside.

    Raises:
        InvalidData: there are fewer than two distinct sources.
    """
    import numpy as np  # not at the top: the command line's help need not wait for it

    # Eight bytes for each pair, however long the texts are.
    hash_N = np.fromiter((_hash(pair.source) for pair in pairs), np.uint64, len(pairs))
    order = np.unique(hash_N)
    if len(order) < 2:
        raise InvalidData(
            f"{len(pairs)} pairs with {len(order)} different sources are too few to set some aside for validation.",
            hint="Give pairs with other sources, or a file for --validation.",
        )
    count = max(1, min(max_sources, round(fraction * len(pairs)), len(order) // 2))
    held_out_N = hash_N <= order[count - 1]
    train, held_out = (array("q", np.flatnonzero(mask_N).tobytes()) for mask_N in (~held_out_N, held_out_N))
    return PairSelection(pairs, train), PairSelection(pairs, held_out)


def digest_pairs(pairs: Iterable[Pair]) -> str:
    """SHA-256 over the pairs, in order."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([pair.source, pair.target]).encode())
    return digest.hexdigest()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")

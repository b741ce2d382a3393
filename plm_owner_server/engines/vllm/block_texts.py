"""Tokens of blocks of attention states, so that a prefix that ends within a block is found, too.

vLLM's own prefix cache finds whole blocks only. A text that a client continues round by round would be run again from
its last whole block: on a CPU 16 tokens on average, where one is new.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence

from plm_owner_server.engines.batching import common_prefix

Parent = tuple[object, ...]
"""Place of a block: the tenant and all tokens before it. With the block's own tokens it determines the states."""

_Tokens = tuple[int, ...]
_Blocks = tuple[int, ...]


class BlockTexts:
    """Tokens of blocks whose texts have ended, by the blocks before them.

    A block is a tuple of ids: one for each group of layers that has blocks of its own.
    """

    def __init__(self) -> None:
        # Sorted: the longest common prefix is shared with a neighbour.
        self._texts: dict[Parent, list[_Tokens]] = defaultdict(list)
        self._blocks: dict[tuple[Parent, _Tokens], _Blocks] = {}
        self._places: dict[int, tuple[Parent, _Tokens]] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def add(self, parent: Parent, token_ids: Sequence[int], blocks: _Blocks) -> None:
        """Add a block. It replaces one with the same tokens.

        Args:
            parent: place of the block.
            token_ids: tokens whose states the block has, from its beginning; at least one.
            blocks: the block's ids.
        """
        tokens = tuple(token_ids)
        for block in (*blocks, *self._blocks.get((parent, tokens), ())):
            self.remove(block)
        insort(self._texts[parent], tokens)
        self._blocks[parent, tokens] = blocks
        self._places |= dict.fromkeys(blocks, (parent, tokens))

    def longest_prefix(self, parent: Parent, token_ids: Sequence[int]) -> tuple[_Blocks, int]:
        """The block that shares most tokens at its beginning, and their number; 0 if no block shares any."""
        texts, tokens = self._texts.get(parent, []), tuple(token_ids)
        place = bisect_left(texts, tokens)
        lengths = {text: common_prefix([text, tokens]) for text in texts[max(0, place - 1) : place + 1]}
        best = max(lengths, key=lambda text: lengths[text], default=())
        return (self._blocks[parent, best], lengths[best]) if best and lengths[best] else ((), 0)

    def remove(self, block: int) -> None:
        """Remove the block that has this id, as its memory is used again. Ids that are not known are ignored."""
        if block not in self._places:
            return
        parent, tokens = self._places[block]
        for each in self._blocks.pop((parent, tokens)):
            del self._places[each]
        texts = self._texts[parent]
        del texts[bisect_left(texts, tokens)]
        if not texts:
            del self._texts[parent]

    def clear(self) -> None:
        """Remove all blocks."""
        self._texts.clear()
        self._blocks.clear()
        self._places.clear()

"""Tokens of blocks, against a search through all of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from plm_owner_server.engines.vllm.block_texts import BlockTexts

_TEXT = st.lists(st.integers(0, 2), min_size=1, max_size=5)
# Ids are used again, as memory is.
_ADDED = st.lists(st.tuples(st.sampled_from("ab"), _TEXT, st.integers(0, 7)), max_size=20)


def _common(first: list[int], second: list[int]) -> int:
    return next(n for n in range(min(len(first), len(second)), -1, -1) if first[:n] == second[:n])


@given(_ADDED, st.sampled_from("ab"), _TEXT, st.sets(st.integers(0, 9)))
def test_the_block_with_the_longest_common_prefix_is_found(
    added: list[tuple[str, list[int], int]], parent: str, wanted: list[int], removed: set[int]
) -> None:
    texts, blocks = BlockTexts(), dict[tuple[str, tuple[int, ...]], int]()
    for behind, text, block in added:
        texts.add((behind,), text, (block, block + 100))
        blocks = {place: other for place, other in blocks.items() if other != block}
        blocks[behind, tuple(text)] = block
    for block in removed:
        texts.remove(block)
    blocks = {place: block for place, block in blocks.items() if block not in removed}
    found, shared = texts.longest_prefix((parent,), wanted)
    options = {block: _common(list(text), wanted) for (behind, text), block in blocks.items() if behind == parent}
    assert shared == max(options.values(), default=0)
    assert found == () if not shared else (options[found[0]], found[1]) == (shared, found[0] + 100)
    assert len(texts) == len(blocks)
    texts.clear()
    assert texts.longest_prefix((parent,), wanted) == ((), 0)


def test_another_parent_shares_nothing() -> None:
    texts = BlockTexts()
    texts.add(("acme",), [1, 2, 3], (4,))
    assert texts.longest_prefix(("other",), [1, 2, 3]) == ((), 0)
    assert texts.longest_prefix(("acme",), [1, 2, 9]) == ((4,), 2)
    texts.add(("acme",), [1, 2, 3], (5,))
    texts.remove(4)
    assert texts.longest_prefix(("acme",), [1, 2, 3]) == ((5,), 3)

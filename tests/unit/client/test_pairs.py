"""Pairs: their split for validation, and their digest."""

import pytest

from data_owner_client.data.pairs import Pair, digest_pairs
from data_owner_client.data.validation_split import split_validation
from protocol.errors import InvalidData


def test_validation_split_keeps_equal_sources_together_and_is_stable() -> None:
    pairs = [Pair(f"text {i % 50}", f"target {i}") for i in range(100)]
    train, held_out = split_validation(pairs, 0.1)
    assert len({pair.source for pair in held_out}) == 10
    assert not {pair.source for pair in train} & {pair.source for pair in held_out}
    assert sorted(map(str, [*train, *held_out])) == sorted(map(str, pairs))
    assert list(split_validation(list(reversed(pairs)), 0.1)[1]) == list(reversed(held_out))
    few, held_out = split_validation(pairs[:4] * 10, 0.5)
    assert len({pair.source for pair in few}) == len({pair.source for pair in held_out}) == 2
    with pytest.raises(InvalidData):
        split_validation(pairs[:1], 0.1)


def test_selected_pairs_are_a_sequence() -> None:
    train, held_out = split_validation([Pair(f"text {i}", f"target {i}") for i in range(50)], 0.2)
    for part in (train, held_out):
        pairs = list(part)
        assert [part[n] for n in range(len(part))] == pairs
        assert list(part[2:5]) == pairs[2:5]
        assert part[-1] == pairs[-1]


def test_digest_depends_on_every_text_and_their_order() -> None:
    pairs = [Pair("Hello", "Hallo"), Pair("a", "b")]
    assert len({digest_pairs(p) for p in (pairs, pairs[::-1], pairs[:1], [Pair("ab", "c")], [Pair("a", "bc")])}) == 5


def test_one_source_is_too_few_to_set_some_aside() -> None:
    with pytest.raises(InvalidData, match="30 pairs have 1 source, which is too few"):
        split_validation([Pair("a", str(number)) for number in range(30)], 0.1)

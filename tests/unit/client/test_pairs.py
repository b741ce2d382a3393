"""Pairs: their split for validation, and their digest."""

import tracemalloc
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_owner_client.data.pairs import Conversation, Pair, digest_pairs
from data_owner_client.data.validation_split import split_validation
from protocol.errors import InvalidData
from tests.profiles import scaled


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
    with pytest.raises(InvalidData, match="0 pairs with 0 different sources"):
        split_validation([], 0.1)
    with pytest.raises(InvalidData, match="30 pairs with 1 different sources are too few"):
        split_validation([Pair("a", str(number)) for number in range(30)], 0.1)


def _conversation(question: str, history: str) -> Conversation | None:
    earlier = [turn for text in history for turn in (("user", text), ("assistant", "x"))]
    turns = [{"role": role, "content": text} for role, text in [*earlier, ("user", question)]]
    return Conversation(tuple(turns)) if earlier else None


SOME_PAIRS = st.lists(
    st.builds(
        lambda question, history, group: Pair(
            question, "t", conversation=_conversation(question, history), group=group
        ),
        st.sampled_from("abcdefgh"),
        st.sampled_from(["", "", "u", "uv"]),
        st.sampled_from(["", "", *"ghijkl"]),
    ),
    min_size=1,
    max_size=40,
)


def _are_connected(pairs: list[Pair]) -> bool:
    """True if one gets from each pair to each other over what they share."""
    reached = _keys(pairs[0])
    for _ in pairs:
        reached |= {key for pair in pairs if _keys(pair) & reached for key in _keys(pair)}
    return all(_keys(pair) <= reached for pair in pairs)


def _keys(pair: Pair) -> set[tuple[str, ...]]:
    """The group of a pair, and its question with the turns before it: pairs that share one belong together."""
    turns = pair.conversation.turns if pair.conversation else ()
    return {("question", pair.source, str(turns)), *([("group", pair.group)] if pair.group else [])}


@given(pairs=SOME_PAIRS, fraction=st.floats(0, 1), seed=st.randoms())
@settings(max_examples=scaled(300), database=None)
def test_pairs_of_a_group_or_question_stay_on_one_side(pairs: list[Pair], fraction: float, seed: Any) -> None:
    try:
        train, held_out = split_validation(pairs, fraction)
    except InvalidData:
        assert len({frozenset(_keys(pair) - {("group", pair.group)}) for pair in pairs}) == 1
        return
    assert train
    assert held_out
    assert Counter(map(id, [*train, *held_out])) == Counter(map(id, pairs))
    sides = [{key for pair in side for key in _keys(pair)} for side in (train, held_out)]
    if _are_connected(pairs):  # no other split is possible
        sides = [{key for key in side if key[0] != "group"} for side in sides]
    assert not sides[0] & sides[1]
    # The order of the pairs changes nothing.
    shuffled = list(pairs)
    seed.shuffle(shuffled)
    assert set(map(id, split_validation(shuffled, fraction)[1])) == set(map(id, held_out))


def test_a_large_group_is_not_set_aside_if_another_can_be() -> None:
    pairs = [Pair(f"text {i}", "t", group="large" if i < 90 else "") for i in range(100)]
    _, held_out = split_validation(pairs, 0.05)
    assert len(held_out) == 5
    assert {pair.group for pair in held_out} == {""}


def test_questions_on_a_single_text_are_split_by_themselves() -> None:
    train, held_out = split_validation([Pair(f"text {i}", "t", group="one") for i in range(100)], 0.05)
    assert (len(train), len(held_out)) == (95, 5)


def test_grouped_pairs_cost_some_bytes_each() -> None:
    pairs = [Pair(f"text {i}", "t", group=str(i // 3)) for i in range(20_000)]
    tracemalloc.start()
    split_validation(pairs, 0.05)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * len(pairs)

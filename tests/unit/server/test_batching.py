"""Planning of forward passes."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plm_owner_server.engines.batching import common_prefix, plan_batches, shared_prefixes

lengths_of = st.lists(st.integers(1, 200), min_size=1, max_size=40)


def padding_of(batch: list[int], lengths: list[int]) -> int:
    return sum(max(lengths[i] for i in batch) - lengths[i] for i in batch)


@given(lengths=lengths_of, budget=st.integers(1, 1000), padding=st.integers(0, 300))
def test_every_sequence_is_planned_once_within_the_limits(lengths: list[int], budget: int, padding: int) -> None:
    plan = plan_batches(lengths, budget, padding)
    assert sorted(i for batch in plan for i in batch) == list(range(len(lengths)))
    for batch in plan:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
        assert padding_of(batch, lengths) <= padding


@given(lengths=lengths_of, budget=st.integers(1, 1000), padding=st.integers(0, 300))
def test_no_batch_could_have_taken_the_next_one_in(lengths: list[int], budget: int, padding: int) -> None:
    plan = plan_batches(lengths, budget, padding)
    for batch, following in pairwise(plan):
        longest = max(lengths[i] for i in batch)
        too_many = (len(batch) + 1) * longest > budget
        assert too_many or padding_of([*batch, following[0]], lengths) > padding


def test_drafted_tokens_count_towards_the_budget() -> None:
    assert plan_batches([10, 10, 10], 60, 0, drafted=20) == [[0, 1], [2]]


def test_similar_lengths_go_together() -> None:
    assert plan_batches([1, 50, 2, 49], 100, 10) == [[1, 3], [2, 0]]
    assert plan_batches([5, 7, 5, 7], 100, 0) == [[1, 3], [0, 2]]
    assert plan_batches([500, 3], 100, 1000) == [[0], [1]]


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [
        ([[1, 2, 3]], 3),
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2], [1, 2, 4], [1, 2]], 2),
        ([[9, 2], [1, 2]], 0),
        ([[], [1]], 0),
    ],
)
def test_common_prefix_by_hand(sequences: list[list[int]], expected: int) -> None:
    assert common_prefix(sequences) == expected


@given(
    prefix=st.lists(st.integers(0, 2), max_size=10),
    rests=st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=6),
)
def test_common_prefix_is_the_longest(prefix: list[int], rests: list[list[int]]) -> None:
    sequences = [prefix + rest for rest in rests]
    length = common_prefix(sequences)
    assert length >= len(prefix)
    assert len({tuple(s[:length]) for s in sequences}) == 1
    assert min(map(len, sequences)) == length or len({s[length] for s in sequences}) > 1


@given(
    sequences=st.lists(st.lists(st.integers(0, 1), max_size=4), max_size=10),
    cached=st.integers(0, 4),
    min_saved_tokens=st.integers(1, 9),
)
def test_shared_prefixes_save_enough_tokens(sequences: list[list[int]], cached: int, min_saved_tokens: int) -> None:
    cached_tokens = [min(cached, len(ids)) for ids in sequences]
    prefixes = shared_prefixes(sequences, cached_tokens, min_saved_tokens)
    members = [index for _, group in prefixes for index in group]
    assert len(members) == len(set(members))
    for length, group in prefixes:
        assert common_prefix([sequences[index] for index in group]) >= length
        assert (len(group) - 1) * (length - cached_tokens[group[0]]) >= min_saved_tokens
    for one, other in combinations(set(range(len(sequences))) - set(members), 2):
        saved = common_prefix([sequences[one], sequences[other]]) - min(cached_tokens[one], cached_tokens[other])
        assert saved < min_saved_tokens


def test_the_prefix_that_saves_most_is_shared() -> None:
    sequences = [[1, 2, 3, 4], [9, 9, 9, 9], [1, 2, 3, 5, 6], [1, 2, 3, 5, 6], [1]]
    assert shared_prefixes(sequences, [0] * 5, 5) == [(3, [0, 2, 3])]
    assert shared_prefixes(sequences, [0] * 5, 7) == []

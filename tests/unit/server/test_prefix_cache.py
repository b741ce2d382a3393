"""The prefix cache: it returns the states of exactly the tokens that were stored."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plm_owner_server.engines.transformers.prefix_cache import PrefixCache
from tests.profiles import scaled

ROW_BYTES = 8
IDS = st.lists(st.integers(0, 2), min_size=1, max_size=12)


def states(ids: list[int]) -> Tensor:
    """States [T, 2] that identify each token and the whole prefix before it."""
    return torch.tensor([[i, hash(tuple(ids[: i + 1])) % 2**20] for i in range(len(ids))], dtype=torch.float32)


def cached(cache: PrefixCache, ids: list[int], tenant: str = "a") -> int:
    """Length of the cached prefix, whose states are checked."""
    pieces = cache.match(tenant, ids)
    length = sum(map(len, pieces))
    if pieces:
        assert torch.equal(torch.cat(pieces), states(ids)[:length])
    return length


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(st.lists(IDS, max_size=12), st.lists(IDS, max_size=12))
def test_a_large_cache_finds_the_longest_stored_prefix(stored: list[list[int]], queries: list[list[int]]) -> None:
    cache = PrefixCache(2**20)
    for ids in stored:
        cache.insert("a", ids, states(ids))
    for ids in stored + queries:
        assert cached(cache, ids) == max((common(ids, other) for other in stored), default=0)
    distinct = {tuple(ids[: i + 1]) for ids in stored for i in range(len(ids))}
    assert cache.size_bytes == ROW_BYTES * len(distinct)


@settings(max_examples=scaled(200))
@given(st.integers(1, 30), st.lists(st.tuples(st.booleans(), IDS, st.integers(1, 12)), max_size=60))
def test_a_small_cache_stays_within_its_bound_and_is_never_wrong(
    rows: int, calls: list[tuple[bool, list[int], int]]
) -> None:
    cache = PrefixCache(rows * ROW_BYTES)
    for insert, ids, last in calls:
        if insert:
            cache.insert("a", ids, states(ids)[-last:])
        else:
            cached(cache, ids)
        assert cache.size_bytes <= rows * ROW_BYTES
        assert cache.size_bytes == sum(node.size_bytes for node in cache._nodes)


def test_the_least_recently_used_goes_first() -> None:
    cache = PrefixCache(6 * ROW_BYTES)
    for first in (1, 2, 3):
        cache.insert("a", [first, 0], states([first, 0]))
    assert cached(cache, [1, 0, 5]) == 2
    cache.insert("a", [4], states([4]))
    assert [cached(cache, [first, 0]) for first in (1, 2, 3)] == [2, 0, 2]


def test_states_without_their_prefix_are_not_stored() -> None:
    cache = PrefixCache(2**20)
    cache.insert("a", [1, 2, 3, 4], states([1, 2, 3, 4])[2:])
    assert cached(cache, [1, 2, 3, 4]) == 0
    cache.insert("a", [1, 2], states([1, 2]))
    cache.insert("a", [1, 2, 3, 4], states([1, 2, 3, 4])[2:])
    assert cached(cache, [1, 2, 3, 4]) == 4


def test_stored_states_are_copies() -> None:
    cache = PrefixCache(2**20)
    big_T_F = torch.zeros(1000, 2)
    big_T_F[:3] = states([1, 2, 3])
    cache.insert("a", [1, 2, 3], big_T_F[:3])
    big_T_F.fill_(torch.nan)
    assert cached(cache, [1, 2, 3]) == 3


@given(st.lists(st.tuples(st.booleans(), IDS, st.integers(0, 4)), max_size=40))
def test_idle_states_are_evicted(calls: list[tuple[bool, list[int], int]]) -> None:
    now = [0.0]
    cache = PrefixCache(2**20, 10, clock=lambda: now[0])
    used: dict[tuple[int, ...], float] = {}  # each cached prefix, with the time of its last use
    for insert, ids, seconds in calls:
        now[0] += seconds
        cache.evict_idle()
        used = {prefix: since for prefix, since in used.items() if now[0] - since <= 10}
        assert {prefix for prefix in used if cached(cache, list(prefix)) == len(prefix)} == set(used)
        # All prefixes were just read, and reading is a use.
        used = dict.fromkeys(used, now[0])
        if insert:
            cache.insert("a", ids, states(ids))
            used |= {tuple(ids[: i + 1]): now[0] for i in range(len(ids))}
        assert cache.size_bytes == ROW_BYTES * len(used)
    now[0] += 10.5
    cache.evict_idle()
    assert cache.size_bytes == 0
    assert not cache._nodes


def test_one_text_is_evicted_and_the_other_stays() -> None:
    now = [0.0]
    cache = PrefixCache(2**20, 10, clock=lambda: now[0])
    cache.insert("a", [1, 2, 3], states([1, 2, 3]))
    cache.insert("a", [1, 2, 4], states([1, 2, 4]))
    now[0] = 8
    assert cached(cache, [1, 2, 4]) == 3
    now[0] = 12
    cache.evict_idle()
    assert cache.size_bytes == 3 * ROW_BYTES
    assert [cached(cache, ids) for ids in ([1, 2, 3], [1, 2, 4])] == [2, 3]
    now[0] = 23
    assert cached(cache, [1, 2, 4]) == 0  # without a call of evict_idle


@given(st.lists(st.tuples(st.sampled_from("abc"), IDS), max_size=20), st.integers(1, 40))
def test_tenants_share_the_bound_and_nothing_else(calls: list[tuple[str, list[int]]], rows: int) -> None:
    cache, alone = PrefixCache(2**20), {tenant: PrefixCache(2**20) for tenant in "abc"}
    small = PrefixCache(rows * ROW_BYTES)
    for tenant, ids in calls:
        for one in (cache, small):
            one.insert(tenant, ids, states(ids))
        alone[tenant].insert("a", ids, states(ids))
        assert small.size_bytes <= rows * ROW_BYTES
    for tenant in "abc":
        for _, ids in calls:
            assert cached(cache, ids, tenant) == cached(alone[tenant], ids)
            assert cached(small, ids, tenant) <= cached(alone[tenant], ids)
    assert cache.size_bytes == sum(one.size_bytes for one in alone.values())

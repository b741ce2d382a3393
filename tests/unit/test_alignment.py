from functools import cache

from hypothesis import given
from hypothesis import strategies as st

from data_owner_client.memory.alignment import align

STOP = 9
TEXTS = st.lists(st.integers(0, 4), max_size=9).map(lambda tokens: [*tokens, STOP])


def longest_common_subsequence(a: list[int], b: list[int]) -> int:
    @cache
    def longest(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        return max(longest(i + 1, j), longest(i, j + 1), longest(i + 1, j + 1) + 1 if a[i] == b[j] else 0)

    return longest(0, 0)


@given(TEXTS, TEXTS)
def test_contexts_end_as_the_true_ones_wherever_they_are_said_to(drafted: list[int], target: list[int]) -> None:
    contexts = align(drafted, target, {STOP})
    assert len(contexts) == len(target)
    assert contexts[0] == (0, True)
    for i, (k, agrees) in enumerate(contexts):
        assert 0 <= k < len(drafted)
        if agrees and i:
            assert drafted[k - 1] == target[i - 1]
    assert [k for k, agrees in contexts if agrees] == sorted({k for k, agrees in contexts if agrees})
    agreeing = sum(agrees for _, agrees in contexts) - 1
    assert agreeing == longest_common_subsequence(drafted[:-1], target[:-1])


def test_a_continuation_that_is_the_target_has_the_true_contexts() -> None:
    assert align([5, 6, 7, STOP], [5, 6, 7, STOP], {STOP}) == [(0, True), (1, True), (2, True), (3, True)]


def test_contexts_behind_the_continuations_end_are_not_used() -> None:
    assert align([5, STOP, 6, 7], [5, 6, 7, STOP], {STOP}) == [(0, True), (1, True), (1, False), (1, False)]
    assert align([STOP, 1, 2], [1, 2, STOP], {STOP}) == [(0, True), (0, False), (0, False)]


def test_after_a_word_of_its_own_the_continuation_is_met_again() -> None:
    assert align([5, 8, 7, STOP], [5, 6, 7, STOP], {STOP}) == [(0, True), (1, True), (2, False), (3, True)]
    assert align([5, 7, 3], [5, 6, 7, STOP], {STOP}) == [(0, True), (1, True), (2, False), (2, True)]

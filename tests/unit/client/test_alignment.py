from functools import cache

from hypothesis import given
from hypothesis import strategies as st

from data_owner_client.memory.alignment import align

STOP = 9
TEXTS = st.lists(st.integers(0, 4), max_size=9).map(lambda tokens: [*tokens, STOP])


def stop_of(drafted: list[int]) -> int | None:
    return drafted.index(STOP) if STOP in drafted else None


def longest_common_subsequence(a: list[int], b: list[int]) -> int:
    @cache
    def longest(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        return max(longest(i + 1, j), longest(i, j + 1), longest(i + 1, j + 1) + 1 if a[i] == b[j] else 0)

    return longest(0, 0)


@given(TEXTS, TEXTS)
def test_contexts_end_as_the_true_ones_wherever_they_are_said_to(drafted: list[int], target: list[int]) -> None:
    contexts = align(drafted, target, stop_of(drafted))
    assert len(contexts) == len(target)
    assert contexts[0][:2] == (0, True)
    for i, (k, matches, is_reliable) in enumerate(contexts):
        assert 0 <= k < len(drafted)
        if matches and i:
            assert drafted[k - 1] == target[i - 1]
        if is_reliable:
            # The true context, or one with the two tokens before.
            assert matches
            assert drafted[:k] == target[:i] or drafted[k - 2 : k] == target[i - 2 : i]
        if drafted[:i] == target[:i]:
            assert (k, matches, is_reliable) == (i, True, True)
    placed = [k for k, matches, _ in contexts if matches]
    assert placed == sorted(set(placed))
    matching = sum(matches for _, matches, _ in contexts) - 1
    assert matching == longest_common_subsequence(drafted[:-1], target[:-1])


def placed(drafted: list[int], target: list[int]) -> list[tuple[int, bool]]:
    return [(context.draft_index, context.matches) for context in align(drafted, target, stop_of(drafted))]


def reliable(drafted: list[int], target: list[int]) -> list[bool]:
    return [context.reliable for context in align(drafted, target, stop_of(drafted))]


def test_a_continuation_that_is_the_target_has_the_true_contexts() -> None:
    assert placed([5, 6, 7, STOP], [5, 6, 7, STOP]) == [(0, True), (1, True), (2, True), (3, True)]


def test_contexts_behind_the_continuations_end_are_not_used() -> None:
    assert placed([5, STOP, 6, 7], [5, 6, 7, STOP]) == [(0, True), (1, True), (1, False), (1, False)]
    assert placed([STOP, 1, 2], [1, 2, STOP]) == [(0, True), (0, False), (0, False)]


def test_after_a_word_of_its_own_the_continuation_is_met_again() -> None:
    assert placed([5, 8, 7, STOP], [5, 6, 7, STOP]) == [(0, True), (1, True), (2, False), (3, True)]
    assert placed([5, 7, 3], [5, 6, 7, STOP]) == [(0, True), (1, True), (2, False), (2, True)]


def test_a_context_is_reliable_where_all_is_the_same_or_the_texts_differ_in_a_few_words() -> None:
    assert reliable([1, 2, 3, STOP], [1, 2, 3, STOP]) == [True, True, True, True]
    assert reliable([1, 2, 8, 3, 4, STOP], [1, 2, 7, 3, 4, STOP]) == [True, True, True, False, False, True]
    assert reliable([1, 2, 8, 8, 8, 8, 3, 6], [1, 2, 7, 3, 5, 6, 6, STOP]) == [True, True, True, *[False] * 5]


def test_no_context_is_reliable_before_a_long_difference_or_behind_a_word_that_may_meet_by_chance() -> None:
    # 1 2, then four words for one; then 3, alone among others.
    assert reliable([0, 1, 2, 8, 8, 8, 8, 3], [4, 1, 2, 7, 3, 5, 5, STOP]) == [True, *[False] * 7]
    # Four words for one at the end.
    assert reliable([0, 1, 2, 8, 8, 8, 8, STOP], [4, 1, 2, 7, STOP]) == [True, *[False] * 4]
    assert reliable([0, 1, 2, 8, 8, 8, STOP], [4, 1, 2, 7, STOP]) == [True, False, False, True, False]


def test_where_a_continuation_was_cut_off_it_is_not_known_to_end() -> None:
    assert reliable([0, 1, 2, STOP], [4, 1, 2, STOP]) == [True, False, False, True]
    assert reliable([0, 1, 2, 3], [4, 1, 2, STOP]) == [True, False, False, False]

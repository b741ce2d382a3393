"""Which context of the PLM's own continuation stands for the true context of each target token.

A private memory has the representations of the contexts I + ŵ_<k, where ŵ is what the PLM itself goes on with. After
its first difference from the target, the k-th of them has nothing to do with the k-th target token (the paper pairs
them all the same). But the two texts meet again: where ŵ_k−1 and y_i−1 are the same word of a common subsequence,
I + ŵ_<k ends as the true context I + y_<i does. Elsewhere the context that follows the last such place is the nearest
there is.

A single word that both have may be a coincidence, and what lies between two such places may be told in other words: a
target that is learned there teaches to skip or to repeat. So it is known, too, which contexts are sure.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple

_MEET_AGAIN = 3
"""Tokens of either text, at most, after which they are the same again behind a sure context."""


class AlignedContext(NamedTuple):
    """What stands for the true context of a target token.

    Attributes:
        drafted: k, the number of drafted tokens in it.
        agrees: whether ŵ_k−1 stands for y_i−1, or both texts begin.
        sure: whether it is the true one, as all tokens so far are the same; or, besides, ŵ_k−2 stands for y_i−2, and
            both texts are the same again, or at their ends, within `_MEET_AGAIN` tokens of each.
    """

    drafted: int
    agrees: bool
    sure: bool


def align(drafted: Sequence[int], target: Sequence[int], stop_ids: Container[int]) -> list[AlignedContext]:
    """For every token of the target a context of the continuation.

    Args:
        drafted: ŵ, as token ids; what follows a stop token is ignored.
        target: y, as token ids.
        stop_ids: tokens that end an answer.
    """
    stop = next((k for k, token in enumerate(drafted) if token in stop_ids), None)
    end = len(drafted) - 1 if stop is None else stop
    follows = {0: 0} | {i + 1: k + 1 for k, i in _common_subsequence(drafted[:end], target[:-1])}
    # Behind the last common word they meet at their ends, but for a continuation that was cut off.
    meetings = [(i - 1, k - 1) for i, k in follows.items() if i]
    meetings.append((len(target) - 1, len(drafted) + _MEET_AGAIN if stop is None else stop))
    contexts, last_k, last_i, met, is_true = list[AlignedContext](), 0, 0, 0, True
    for i in range(len(target)):
        agrees = i in follows
        is_true = is_true and follows.get(i) == i
        if agrees:
            last_k, last_i = follows[i], i
        while meetings[met][0] < i:
            met += 1
        apart = max(meetings[met][0] - i, meetings[met][1] - last_k)
        sure = is_true or (agrees and apart <= _MEET_AGAIN and follows.get(i - 1) == last_k - 1)
        contexts.append(AlignedContext(min(last_k + i - last_i, end), agrees, sure))
    return contexts


def _common_subsequence(a: Sequence[int], b: Sequence[int]) -> list[tuple[int, int]]:
    """Places of a longest common subsequence in both."""
    length = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in reversed(range(len(a))):
        for j in reversed(range(len(b))):
            same = a[i] == b[j]
            length[i][j] = length[i + 1][j + 1] + 1 if same else max(length[i + 1][j], length[i][j + 1])
    places, i, j = list[tuple[int, int]](), 0, 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            places.append((i, j))
            i, j = i + 1, j + 1
        elif length[i + 1][j] >= length[i][j + 1]:
            i += 1
        else:
            j += 1
    return places

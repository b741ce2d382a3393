"""Alignment of the target's contexts with those of the PLM's own continuation, for private memories.

A private memory holds representations of the contexts I + ŵ_<k, where ŵ is the PLM's greedy continuation of the prompt
I. After the first difference from the target, the k-th context no longer belongs to the k-th target token. The paper
pairs them by position anyway. Here, a longest common subsequence of both texts is used. Where ŵ_k−1 and y_i−1 are the
same word of it, I + ŵ_<k ends as the true context I + y_<i does. Elsewhere the context that follows the last such match
is the nearest one.

A single word that both texts have may be a coincidence, and the texts may differ between two matches. A target learned
there teaches the adapter to skip or to repeat words. So each context is also marked as reliable or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_MAX_TOKENS_APART = 3
"""A reliable context is followed by the next match, or by both ends, within this many tokens of either text."""


class AlignedContext(NamedTuple):
    """The context that stands for the true context of one target token.

    Attributes:
        draft_index: k, the number of drafted tokens in the context; 0 for the prompt alone.
        matches: whether ŵ_k−1 is the same word of the common subsequence as y_i−1, or both texts begin here.
        reliable: whether the match is no coincidence. True if all tokens so far are equal. Also true if ŵ_k−2 matches
            y_i−2, too, and the next match or both ends follow within `_MAX_TOKENS_APART` tokens.
    """

    draft_index: int
    matches: bool
    reliable: bool


def align(drafted: Sequence[int], target: Sequence[int], stop: int | None) -> list[AlignedContext]:
    """Choose a context of the continuation for every token of the target.

    Args:
        drafted: ŵ, as token ids; tokens after its stop are ignored.
        target: y, as token ids.
        stop: index in `drafted` of the token that ends the answer; None if the continuation was cut off.
    """
    end = len(drafted) - 1 if stop is None else stop
    draft_index_of = {0: 0} | {i + 1: k + 1 for k, i in _common_subsequence(drafted[:end], target[:-1])}
    # After the last common word, both texts meet again at their ends, unless the continuation was cut off.
    meetings = [(i - 1, k - 1) for i, k in draft_index_of.items() if i]
    meetings.append((len(target) - 1, len(drafted) + _MAX_TOKENS_APART if stop is None else stop))
    contexts, last_k, last_i, meeting, is_true = list[AlignedContext](), 0, 0, 0, True
    for i in range(len(target)):
        matches = i in draft_index_of
        is_true = is_true and draft_index_of.get(i) == i
        if matches:
            last_k, last_i = draft_index_of[i], i
        while meetings[meeting][0] < i:
            meeting += 1
        apart = max(meetings[meeting][0] - i, meetings[meeting][1] - last_k)
        follows_match = draft_index_of.get(i - 1) == last_k - 1
        reliable = is_true or (matches and apart <= _MAX_TOKENS_APART and follows_match)
        contexts.append(AlignedContext(min(last_k + i - last_i, end), matches, reliable))
    return contexts


def _common_subsequence(a: Sequence[int], b: Sequence[int]) -> list[tuple[int, int]]:
    """Indices in `a` and in `b` of each token of a longest common subsequence."""
    length = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in reversed(range(len(a))):
        for j in reversed(range(len(b))):
            same = a[i] == b[j]
            length[i][j] = length[i + 1][j + 1] + 1 if same else max(length[i + 1][j], length[i][j + 1])
    indices, i, j = list[tuple[int, int]](), 0, 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            indices.append((i, j))
            i, j = i + 1, j + 1
        elif length[i + 1][j] >= length[i][j + 1]:
            i += 1
        else:
            j += 1
    return indices

"""Which context of the PLM's own continuation stands for the true context of each target token.

A private memory has the representations of the contexts I + ŵ_<k, where ŵ is what the PLM itself goes on with. After
its first difference from the target, the k-th of them has nothing to do with the k-th target token (the paper pairs
them all the same). But the two texts meet again: where ŵ_k−1 and y_i−1 are the same word of a common subsequence,
I + ŵ_<k ends as the true context I + y_<i does. Elsewhere the context that follows the last such place is the nearest
there is.
"""

from __future__ import annotations

from collections.abc import Container, Sequence


def align(drafted: Sequence[int], target: Sequence[int], stop_ids: Container[int]) -> list[tuple[int, bool]]:
    """For every token of the target a context of the continuation, and whether it ends as the true one does.

    Args:
        drafted: ŵ, as token ids; what follows a stop token is ignored.
        target: y, as token ids.
        stop_ids: tokens that end an answer.

    Returns:
        k, the number of drafted tokens in the context; and true where ŵ_k−1 stands for y_i−1, or both texts begin.
    """
    end = next((k for k, token in enumerate(drafted) if token in stop_ids), len(drafted) - 1)
    follows = {0: 0} | {i + 1: k + 1 for k, i in _common_subsequence(drafted[:end], target[:-1])}
    contexts, last_k, last_i = list[tuple[int, bool]](), 0, 0
    for i in range(len(target)):
        if i in follows:
            last_k, last_i = follows[i], i
        contexts.append((min(last_k + i - last_i, end), i in follows))
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

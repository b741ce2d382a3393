"""Planning of forward passes: the sequences that go through the model together."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix


def plan_batches(
    lengths: Sequence[int], batch_tokens: int, padding_tokens: float, *, drafted: int = 0
) -> list[list[int]]:
    """Group sequence indices, similar lengths together.

    The plan depends on the arguments alone, so that equal requests are computed in equal batches.

    Args:
        lengths: tokens of each sequence.
        batch_tokens: largest number of tokens in a batch, padding included. A longer sequence makes a batch alone.
        padding_tokens: largest number of padding tokens in a batch; with 0, only equal lengths go together.
        drafted: tokens that will be drafted after each sequence; they count towards `batch_tokens`.
    """
    batches: list[list[int]] = []
    padding = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # Sorted by falling length: the first of a batch is its longest.
        longest = lengths[batches[-1][0]] if batches else 0
        padding += longest - lengths[index]
        if batches and (len(batches[-1]) + 1) * (longest + drafted) <= batch_tokens and padding <= padding_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
            padding = 0
    return batches


def shared_prefixes(
    sequences: Sequence[Sequence[int]], cached: Sequence[int], min_saved_tokens: int
) -> list[tuple[int, list[int]]]:
    """Prefixes that several sequences share, where computing one for all saves enough tokens.

    Args:
        sequences: token ids of each sequence.
        cached: number of leading tokens of each sequence that need no computing.
        min_saved_tokens: smallest number of tokens that a prefix must save.

    Returns:
        The tokens of each prefix, and the indices of the sequences that begin with it. No sequence has two.
    """
    prefixes: list[tuple[int, list[int]]] = []
    # In this order, those that share most tokens with the first one follow it.
    waiting = sorted(range(len(sequences)), key=lambda index: tuple(sequences[index]))
    while waiting:
        first, most_saved, members = waiting[0], min_saved_tokens, 1
        length = shared = len(sequences[first])
        for others, index in enumerate(waiting[1:], start=1):
            length = common_prefix([sequences[first][:length], sequences[index]])
            if length <= cached[first]:
                break
            if (saved := others * (length - cached[first])) >= most_saved:
                shared, most_saved, members = length, saved, others + 1
        if members > 1:
            prefixes.append((shared, waiting[:members]))
        del waiting[:members]
    return prefixes


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Number of leading token ids that all sequences share."""
    return len(commonprefix([list(sequence) for sequence in sequences]))  # noqa: RUF071  (of lists, not of paths)

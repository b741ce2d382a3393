"""Which sequences go through the model together."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix


def plan_batches(
    lengths: Sequence[int], batch_tokens: int, padding_tokens: float, *, drafted: int = 0
) -> list[list[int]]:
    """Group sequence indices, similar lengths together.

    No padded batch exceeds `batch_tokens` tokens, but for a sequence that does so alone; no batch holds more than
    `padding_tokens` tokens of padding, so that with 0 only equal lengths go together. The plan depends on the lengths
    alone: the same request is always computed in the same way. `drafted` tokens a sequence count towards the former.
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


def duplicate_groups(sequences: Sequence[Sequence[int]], known: Sequence[int], worth: int) -> list[list[int]]:
    """Indices of sequences that are the same, where it is worth a pass of its own to compute them once.

    Args:
        sequences: token ids.
        known: leading tokens of each that need no computing.
        worth: tokens that a group must save.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, ids in enumerate(sequences):
        groups.setdefault(tuple(ids), []).append(index)
    return [own for ids, own in groups.items() if (len(own) - 1) * (len(ids) - known[own[0]]) >= worth]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Number of leading token ids that all sequences share."""
    return len(commonprefix([list(sequence) for sequence in sequences]))  # noqa: RUF071  (of lists, not of paths)

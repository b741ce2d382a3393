"""Which sequences go through the model together."""

from __future__ import annotations

from collections.abc import Sequence


def plan_batches(lengths: Sequence[int], batch_tokens: int, *, pad: bool = True) -> list[list[int]]:
    """Group sequence indices, similar lengths together, so that no padded batch exceeds `batch_tokens` tokens.

    A sequence longer than the budget gets a batch of its own; without `pad`, only equal lengths go together. The plan
    depends on the lengths alone, so the same request is always computed in the same way.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # Sorted by falling length: the first of a batch is its longest.
        longest = lengths[batches[-1][0]] if batches else 0
        fits = batches and (len(batches[-1]) + 1) * longest <= batch_tokens
        if fits and (pad or lengths[index] == longest):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Number of leading token ids that all sequences share."""
    shortest = min(sequences, key=len)
    others = [sequence for sequence in sequences if sequence is not shortest]
    for position, token_id in enumerate(shortest):
        if any(sequence[position] != token_id for sequence in others):
            return position
    return len(shortest)

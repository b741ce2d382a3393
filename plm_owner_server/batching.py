"""Which sequences go through the model together."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix


def plan_batches(
    lengths: Sequence[int], batch_tokens: int, padding_tokens: int, *, drafted: int = 0
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


def plan_drafting(
    lengths: Sequence[int],
    look_ahead: Sequence[int],
    batch_tokens: int,
    padding_tokens: int,
    window: int | None,
) -> list[list[int]]:
    """The same for sequences that are drafted on; those drafted about equally far go together.

    A batch takes as many steps as its farthest sequence, so a far one should not go on alone in many batches. `window`
    is the narrowest attention window: beyond it there must be no padding.
    """
    groups: dict[int, list[int]] = {}
    for index, k in enumerate(look_ahead):
        groups.setdefault(k.bit_length(), []).append(index)  # within a factor of two
    plan = []
    for _, group in sorted(groups.items()):
        most = max(look_ahead[i] for i in group)
        own = [lengths[i] for i in group]
        allowed = _padding_allowed(own, most, padding_tokens, window)
        batches = plan_batches(own, batch_tokens, allowed, drafted=most)
        plan += [[group[i] for i in batch] for batch in batches]
    return plan


def fits_together(
    lengths: Sequence[int], drafted: int, batch_tokens: int, padding_tokens: int, window: int | None
) -> bool:
    """Whether several sequences make one batch under the same rules."""
    allowed = _padding_allowed(lengths, drafted, padding_tokens, window)
    return len(plan_batches(lengths, batch_tokens, allowed, drafted=drafted)) == 1


def _padding_allowed(lengths: Sequence[int], drafted: int, padding_tokens: int, window: int | None) -> int:
    """Padding in a batch of such sequences: none once the longest may reach beyond the window."""
    return padding_tokens if window is None or max(lengths) + drafted <= window else 0


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Number of leading token ids that all sequences share."""
    return len(commonprefix([list(sequence) for sequence in sequences]))  # noqa: RUF071  (of lists, not of paths)

"""Targets that the model's tokenizer cannot write as they are."""

from __future__ import annotations

from collections.abc import Iterable

from data_owner_client.data.pairs import Pair
from data_owner_client.plm.tokenizer import PlmTokenizer

# Characters that are shown on each side of the first difference.
_SHOWN = 20


def describe_target_changes(tokenizer: PlmTokenizer, pairs: Iterable[Pair]) -> str | None:
    """One line about the targets that tokenising changes, with the first of them; None if there are none.

    Some tokenizers write all letters small, or have no token for some characters. Answers have such changes, too.
    """
    targets = changed = 0
    example = ""
    for pair in pairs:
        if pair.target is None:
            continue
        targets += 1
        if (change := tokenizer.change(pair.target)) is not None:
            changed += 1
            example = example or _difference(pair.target, change)
    if not changed:
        return None
    return f"The model's tokenizer changes {changed:,} of {targets:,} targets, and so its answers: {example}."


def _difference(text: str, change: str) -> str:
    different = (at for at, (old, new) in enumerate(zip(text, change, strict=False)) if old != new)
    start = max(0, next(different, min(len(text), len(change))) - _SHOWN)
    end = start + 2 * _SHOWN
    return f"{text[start:end]!r} becomes {change[start:end]!r}"

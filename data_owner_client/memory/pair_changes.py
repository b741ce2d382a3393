"""Parts of pairs that the model's tokenizer or chat template cannot write as they are."""

from __future__ import annotations

from collections.abc import Iterable

from data_owner_client.data.pairs import Pair
from data_owner_client.data.tasks import Task
from data_owner_client.plm.tokenizer import PlmTokenizer

# Characters that are shown on each side of the first difference.
_SHOWN = 20


def describe_changes(task: Task, tokenizer: PlmTokenizer, pairs: Iterable[Pair]) -> list[str]:
    """A line about the targets that tokenising changes, and one about tools that the chat template leaves out.

    Some tokenizers write all letters small, or have no token for some characters. Answers have such changes, too.
    """
    targets = changed = without_tools = 0
    example = ""
    for pair in pairs:
        without_tools += task.loses_tools(pair.question, tokenizer)
        if pair.target is None:
            continue
        targets += 1
        if (change := tokenizer.change(pair.target)) is not None:
            changed += 1
            example = example or _difference(pair.target, change)
    lines = []
    if changed:
        lines.append(
            f"The model's tokenizer changes {changed:,} of {targets:,} targets, and so its answers: {example}."
        )
    if without_tools:
        lines.append(f"The model's chat template writes no tools: {without_tools:,} pairs are learned without them.")
    return lines


def _difference(text: str, change: str) -> str:
    different = (at for at, (old, new) in enumerate(zip(text, change, strict=False)) if old != new)
    start = max(0, next(different, min(len(text), len(change))) - _SHOWN)
    end = start + 2 * _SHOWN
    return f"{text[start:end]!r} becomes {change[start:end]!r}"

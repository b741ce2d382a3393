"""The last prompt of a task in a text that other programs wrote."""

from __future__ import annotations

from dataclasses import dataclass

from data_owner_client.data.tasks.task import Task
from data_owner_client.plm.tokenizer import PlmTokenizer
from protocol.errors import InvalidData, Unsupported

# A source that no prompt has and no chat template changes.
_SOURCE = "pemaXsourceXtext"


@dataclass(frozen=True)
class LastPrompt:
    """A prompt that a text contains.

    Attributes:
        end: number of characters up to its end, where the answer begins.
        source: source text of the prompt; None if its beginning was not found.
    """

    end: int
    source: str | None


def last_prompt(task: Task, text: str, tokenizer: PlmTokenizer) -> LastPrompt | None:
    """The last prompt in a text by what the task writes behind a source: in `plain`, its open target label.

    Args:
        task: the task.
        text: a text, with special tokens spelled out.
        tokenizer: the PLM's tokenizer, with its chat templates.

    Returns:
        The prompt; None if there is none.
    """
    try:
        before, found, behind = task.prompt(_SOURCE, tokenizer).text.rpartition(_SOURCE)
    except (InvalidData, Unsupported):
        return None
    at = text.rfind(behind)
    if not found or not behind.strip() or at < 0:
        return None
    # The instruction and the examples may be others, so the label before a source counts, too.
    for opening in (before, before.rpartition("\n")[2]):
        start = text.rfind(opening, 0, at) if opening.strip() else -1
        if start >= 0:
            return LastPrompt(at + len(behind), text[start + len(opening) : at])
    return LastPrompt(at + len(behind), None)

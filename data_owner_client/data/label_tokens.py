"""Labels of a `classify` task, and their token ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pydantic import ValidationError

from data_owner_client.data.pairs import Pair, Source, texts_of
from data_owner_client.data.tasks import Task
from data_owner_client.plm.tokenizer import PlmTokenizer, Prompt
from data_owner_client.runtime.validation_errors import first_message
from protocol.errors import InvalidData

LabelIds = tuple[tuple[int, ...], ...]
"""Token ids of each label, in the order of the task, with the end of an answer behind it."""
# More different targets than these are answers of another kind, and scoring them would take as many calls.
_MOST_LABELS = 1000


def with_labels_of(task: Task, parts: Sequence[Sequence[Pair]]) -> Task:
    """The task with the pairs' different targets as its labels, sorted, if it is a `classify` task without its own.

    Args:
        task: any task.
        parts: pairs to train on, and pairs to validate on.

    Raises:
        InvalidData: the targets are too many to be labels, or cannot be labels.
    """
    if task.kind != "classify" or task.labels:
        return task
    counts = Counter(pair.target.strip() for part in parts for pair in part if pair.target and pair.target.strip())
    pairs = sum(map(len, parts))
    # Of few pairs, each may have its own label.
    if len(counts) > _MOST_LABELS or len(counts) > max(2, pairs / 2):
        raise InvalidData(
            f"{pairs:,} pairs have {len(counts):,} different targets, too many to be the labels of a classify task.",
            hint="Write the labels into the task file, or choose another kind of task, such as rewrite or answer.",
        )
    try:
        return Task.model_validate({**task.model_dump(), "labels": sorted(counts)})
    except ValidationError as error:
        raise InvalidData(
            f"The targets cannot be the labels of a classify task: {first_message(error)}.",
            hint="Correct the targets, or write the labels into the task file.",
        ) from error


class LabelTokenizer:
    """Tokenises the labels of a task behind prompts.

    Tokens of a label depend on the end of the prompt alone. So prompts share them that have the same text behind their
    source.

    Args:
        tokenizer: the PLM's tokenizer.
        labels: all labels.

    Raises:
        InvalidData: there are no labels, an empty one, or the same one twice.
    """

    def __init__(self, tokenizer: PlmTokenizer, labels: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self.labels = require_labels(labels)
        self._ids_behind: dict[str, LabelIds] = {}

    def check(self, task: Task) -> LabelIds:
        """Refuse labels that cannot be answers behind any text; return their token ids behind a short one.

        Raises:
            InvalidData: a label holds the task's stop, or has the tokens of another one.
        """
        source = "."
        prompt = task.prompt(source, self._tokenizer)
        label_ids = self.behind(task, source, prompt, self._tokenizer.encode_prompt(prompt))
        require_distinct(self.labels, label_ids)
        return label_ids

    def behind(self, task: Task, source: Source, prompt: Prompt, prompt_ids: list[int]) -> LabelIds:
        """Token ids of each label behind a prompt.

        Args:
            task: task of the prompt.
            source: text or conversation in the prompt.
            prompt: the prompt as text.
            prompt_ids: the prompt as token ids.

        Raises:
            InvalidData: a label holds the task's stop.
        """
        # Chat templates may trim texts, and write a system turn's elsewhere.
        text = texts_of(source)[-1].strip()
        tail = prompt.text.rpartition(text)[2] if text and text in prompt.text else ""
        if tail in self._ids_behind:
            return self._ids_behind[tail]
        label_ids = tuple(self._ids(task, source, prompt, prompt_ids, label) for label in self.labels)
        if tail:
            self._ids_behind[tail] = label_ids
        return label_ids

    def _ids(self, task: Task, source: Source, prompt: Prompt, prompt_ids: list[int], label: str) -> tuple[int, ...]:
        pair = Pair(source, label) if isinstance(source, str) else Pair("", label, conversation=source)
        try:
            target = task.prompt_and_target(pair, self._tokenizer)[1]
        except InvalidData as error:
            raise InvalidData(f"The label {label!r} cannot be an answer: {error.detail}", hint=error.hint) from error
        return tuple(self._tokenizer.encode_target(prompt, prompt_ids, target))


def require_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """The labels, if they can be told apart.

    Raises:
        InvalidData: there are none, an empty one, or the same one twice.
    """
    if not labels:
        raise InvalidData(
            "The task names no labels to choose from.",
            hint='Write them into the task file: labels = ["spam", "ham"]; or use an adapter of this task.',
        )
    if any(not label.strip() for label in labels):
        raise InvalidData("A label of the task is empty.", hint="Give each label a text.")
    if twice := [label for label, count in Counter(labels).items() if count > 1]:
        raise InvalidData(f"The task names the label {twice[0]!r} twice.", hint="Write each label once.")
    return tuple(labels)


def longest_prefixes(label_ids: LabelIds) -> list[tuple[int, ...]]:
    """Labels without their last token, except those that another one begins with: sent, they lead to every label."""
    prefixes = {ids[:-1] for ids in label_ids}
    shorter = {ids[:length] for ids in prefixes for length in range(len(ids))}
    return sorted(prefixes - shorter)


def require_distinct(labels: Sequence[str], label_ids: LabelIds) -> None:
    """Require token ids that tell the labels apart.

    Raises:
        InvalidData: the tokens of a label begin with all tokens of another one, or are the same.
    """
    prefixes = Counter(ids[:length] for ids in label_ids for length in range(1, len(ids) + 1))
    for label, ids in zip(labels, label_ids, strict=True):
        if prefixes[ids] > 1:
            raise _ambiguous(labels, label_ids, label)


def _ambiguous(labels: Sequence[str], label_ids: LabelIds, label: str) -> InvalidData:
    """The error for a label with all of whose tokens another one begins."""
    own = label_ids[labels.index(label)]
    other = next(each for each, ids in zip(labels, label_ids, strict=True) if each != label and ids[: len(own)] == own)
    return InvalidData(
        f"The model's tokenizer cannot tell the labels {label!r} and {other!r} apart.",
        hint="Write one of them in another way.",
    )

"""Checks of pairs against a task, as far as they need no tokenizer of a model."""

from __future__ import annotations

from collections.abc import Sequence

from data_owner_client.data.chat_turns import CHAT_HINT, single_text
from data_owner_client.data.checking.files import Part, check_files, with_problem_of_all
from data_owner_client.data.checking.report import DataReport
from data_owner_client.data.earlier_answers import first_answers
from data_owner_client.data.label_tokens import with_labels_of
from data_owner_client.data.pairs import Pair
from data_owner_client.data.reading.problems import InvalidText, Origin, Problems
from data_owner_client.data.tasks import Task
from protocol.errors import InvalidData


def check_answers(
    task: Task, parts: Sequence[Part], problems: Problems, *, memory_parts: int, share_earlier_answers: bool
) -> DataReport:
    """Report on files and their answers to a task, without a server.

    Args:
        task: the task.
        parts: the files; the first ones become memories.
        problems: problems of reading; those of the task are added.
        memory_parts: number of files that become memories.
        share_earlier_answers: whether prompts may show earlier answers of their conversations.
    """
    learned: list[Sequence[Pair]] = [part.pairs for part in parts]
    if not share_earlier_answers:
        learned[:memory_parts] = map(first_answers, learned[:memory_parts])
    try:
        _add_problems(task, learned, problems, memory_parts=memory_parts)
    except InvalidData as error:  # such as too many labels
        return with_problem_of_all(check_files(parts, problems), error)
    return check_files(parts, problems, task.labels)


def _add_problems(task: Task, parts: Sequence[Sequence[Pair]], problems: Problems, *, memory_parts: int) -> None:
    """Add the problems of pairs that the task cannot have.

    Args:
        task: the task; without labels of its own, a `classify` task has those of the parts that become memories.
        parts: pairs of each file; the first ones become memories.
        problems: receives the problems.
        memory_parts: number of files that become memories.

    Raises:
        InvalidData: the targets cannot be labels.
    """
    task = with_labels_of(task, parts[:memory_parts])
    for pairs in parts:
        for index, pair in enumerate(pairs):
            try:
                _require_pair(task, pair)
            except InvalidData as error:
                problems.add(pair.origin or Origin("pair", index + 1, in_file=False), error)


def _require_pair(task: Task, pair: Pair) -> None:
    if task.format == "plain":
        if pair.reply is not None:
            raise InvalidText("an answer that is more than text", hint=CHAT_HINT)
        single_text(pair.question)
    if pair.reply is None:  # else the model's template writes it
        task.require_answer(pair)

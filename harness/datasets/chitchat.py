"""Real data for conversation: two people who get to know each other.

The package `chitchat-dataset` (MIT) carries the conversations of BYU's Chit-Chat Challenge.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_owner_client.data.tasks import Task
from harness.datasets.drawing import without_near_duplicates
from harness.datasets.files import is_prepared, write_consecutive_splits, write_task
from harness.datasets.packages import fetch_wheel, keep_licences, read_members

PACKAGE = "chitchat-dataset==0.9.0"
TRAIN, VALIDATION, TEST = 1000, 100, 80
MOST_TURNS = 6
"""Turns of a conversation; the rest is cut off."""
_LONGEST_TURN = 200
_OPENING_WORDS = 4
_SIMILARITY = 0.7
_SEED = 20261127
Conversation = list[dict[str, str]]


def prepare(folder: Path, train: int = TRAIN) -> None:
    """Write conversations as `messages`, unless they are there already.

    No opening is nearly one of another split.
    """
    if is_prepared(folder):
        return
    wheel = fetch_wheel(PACKAGE, folder)
    keep_licences(wheel, folder)
    (data,) = read_members(wheel, "chitchat_dataset/dataset.json".__eq__).values()
    drawn = [{"messages": turns} for turns in conversations(json.loads(data).values())]
    random.Random(_SEED).shuffle(drawn)
    write_consecutive_splits(folder, drawn, train=train, validation=VALIDATION, test=TEST)
    write_task(
        folder / "task.toml",
        Task(
            name="chitchat",
            kind="chat",
            format="chat",
            instruction="You chat with somebody whom you have just met. Answer in one or two short sentences.",
        ),
    )


def conversations(records: Iterable[Mapping[str, Any]]) -> list[Conversation]:
    """The usable conversations, cut to a few turns; the first speaker is the user.

    An opening of a few words (`Hi`) is left out, as are conversations with long turns.
    """
    found: list[Conversation] = []
    for record in records:
        turns = _turns(record["messages"])
        if len(turns) >= 2 and len(turns[0]["content"].split()) >= _OPENING_WORDS:
            found.append(turns)
    found.sort(key=str)
    openings = [turns[0]["content"] for turns in found]
    return [found[index] for index in without_near_duplicates(openings, _SIMILARITY)] if found else []


def _turns(messages: Sequence[Sequence[Mapping[str, str]]]) -> Conversation:
    """The turns up to the first long or empty one, an even number of them, by two speakers in turn."""
    turns: Conversation = []
    for number, parts in enumerate(messages[:MOST_TURNS]):
        text = " ".join(" ".join(part["text"] for part in parts).split())
        if not 0 < len(text) <= _LONGEST_TURN:
            break
        turns.append({"role": "assistant" if number % 2 else "user", "content": text})
    return turns[: len(turns) // 2 * 2]

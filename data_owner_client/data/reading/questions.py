"""Questions with answers, and SQuAD's articles, as pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_owner_client.data.pairs import Pair, group_name
from data_owner_client.data.reading.fields import (
    Extraction,
    Record,
    is_missing,
    joined,
    look_up,
    parsed,
    require_json,
    require_unique,
)
from data_owner_client.data.reading.problems import InvalidText

# As JSON, and as the field of a table.
_TRUE = ("true", "1")


def question_and_answers(record: Record, answers: str, extraction: Extraction) -> Iterator[Pair]:
    """Yield the pair of a question, behind its context if it has one, and its answers.

    Args:
        record: the record.
        answers: name of the field with the answer or the answers.
        extraction: how pairs are taken.
    """
    value = look_up(record, answers) if extraction.need_targets else None
    if answers == "answers":
        require_json(parsed(value))
    yield _pair(record, record.get("context"), value, extraction)


def articles(record: Record, extraction: Extraction) -> Iterator[Pair | InvalidText]:
    """Yield a pair for each question on an article of SQuAD's JSON, or what is wrong with it."""
    for paragraph in _objects(parsed(look_up(record, "paragraphs")), "paragraphs"):
        for question in _objects(look_up(paragraph, "qas"), "qas"):
            try:
                value = question.get("answers") if extraction.need_targets else None
                yield _pair(question, look_up(paragraph, "context"), value, extraction)
            except InvalidText as problem:
                yield problem


def _pair(record: Record, context: object, value: object, extraction: Extraction) -> Pair:
    source = joined(context, look_up(record, "question"), "context")
    if not extraction.need_targets:
        return extraction.pair(source, None)
    texts = _texts(value)
    if str(record.get("is_impossible")).lower() in _TRUE or not texts:
        raise InvalidText(
            "a question without an answer",
            hint="Give an answer that says so, such as “unanswerable”, or leave the question out.",
        )
    # Questions on one text give each other's answers away.
    group = "" if is_missing(context) else group_name(str(context))
    return extraction.pair(source, texts[0], references=texts[1:], group=group)


def _texts(value: object) -> Sequence[Any]:
    """The answers: a text, a list of texts, SQuAD's object with a list of texts, or a list of objects with a text."""
    value = parsed(value)
    require_unique(value)
    if isinstance(value, Mapping):
        value = look_up(value, "text")
    answers = value if isinstance(value, list) else [] if is_missing(value) else [value]
    return [look_up(answer, "text") if isinstance(answer, Mapping) else answer for answer in answers]


def _objects(value: object, name: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise InvalidText(f"{name} that are no list of objects", hint="Give the JSON of SQuAD as it is.")
    return value

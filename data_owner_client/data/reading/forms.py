"""Forms of records, which are recognised by their keys: one form a file.

A new form is one more entry of `FORMS`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from data_owner_client.data.pairs import Pair
from data_owner_client.data.reading.fields import FIELDS_HINT, TRANSLATION, Extraction, Record, cut, look_up, shown
from data_owner_client.data.reading.labels import label_of
from data_owner_client.data.reading.problems import InvalidText
from data_owner_client.data.reading.questions import articles, question_and_answers
from data_owner_client.data.reading.settings import ReadingSettings
from data_owner_client.data.reading.turns import conversation_in, instruction_and_answer, prompt_and_completion
from protocol.errors import InvalidData

_PREFERENCE = {"chosen", "rejected"}


@dataclass(frozen=True)
class Form:
    """A form of records.

    Attributes:
        title: name of the form.
        keys: keys by which it is recognised; the source is under the first.
        read: yields the pairs of a record, and the problems of its parts; raises those of the whole record.
        optional: further keys that it reads.
        record: noun for one of its records.
    """

    title: str
    keys: tuple[str, ...]
    read: Callable[[Record, Extraction], Iterable[Pair | InvalidText]]
    optional: tuple[str, ...] = ()
    record: str = "record"

    def __str__(self) -> str:
        return " and ".join(map(repr, self.keys))


def fields(source: str, target: str, title: str = "fields by name") -> Form:
    """The form of records with two named fields. With names of labels, the target is a label."""

    def read(record: Record, extraction: Extraction) -> Iterator[Pair]:
        value = look_up(record, target) if extraction.need_targets else None
        named = label_of(value, extraction) if extraction.labels and extraction.need_targets else value
        yield extraction.pair(look_up(record, source), named)

    return Form(title, (source, target), read)


def recognise(names: Collection[str], settings: ReadingSettings, *, need_targets: bool = True) -> Form | None:
    """The form of a record with these keys, or the one that the settings name; None if there is none.

    Raises:
        InvalidData: there are several, or it is one that cannot be learned.
    """
    if settings.source_field or settings.target_field:
        return fields(settings.source_field or "source", settings.target_field or "target")
    if need_targets and set(names) >= _PREFERENCE:
        raise InvalidData(
            "These are preferences, `chosen` and `rejected`, which cannot be learned.",
            hint="Learn the chosen answers: --source-field prompt --target-field chosen.",
        )
    # All keys first: `source` beside `prompt` and `completion` says where a pair comes from. Then the source alone.
    whole = [form for form in FORMS if set(form.keys) <= set(names)]
    if need_targets and not whole and "text" in names:
        raise InvalidData(
            "There is a `text` and nothing that says which part of it is to be learned.",
            hint=f"Part it into a source and a target. Or name its target, such as --source-field text "
            f"--target-field {_other_name(names)}.",
        )
    forms = _most_specific(whole) or _most_specific([form for form in FORMS if form.keys[0] in names], sources=True)
    if len(forms) > 1:
        raise InvalidData(
            f"There are fields of several forms: {'; '.join(map(str, forms))}.",
            hint=f"The fields are {shown(names)}. {FIELDS_HINT} For turns, leave the other fields out.",
        )
    return forms[0] if forms else None


def _other_name(names: Collection[str]) -> str:
    return next((shlex.quote(cut(name)) for name in names if name != "text"), "NAME")


def _most_specific(forms: list[Form], *, sources: bool = False) -> list[Form]:
    """The forms whose keys are no part of another form's; with `sources`, their first keys, each once."""

    def keys(form: Form) -> set[str]:
        return set(form.keys[:1] if sources else form.keys)

    specific = [
        form
        for form in forms
        if not any(keys(form) < keys(other) | set(other.optional) for other in forms if keys(other) != keys(form))
    ]
    return list({form.keys[0]: form for form in reversed(specific)}.values()) if sources else specific


def has_form(record: Record, settings: ReadingSettings) -> bool:
    """Return True if a record has all keys of a form, or the fields that the settings name."""
    if settings.source_field or settings.target_field:
        try:
            look_up(record, settings.source_field or "source")
        except InvalidText:
            return False
        return True
    return any(set(form.keys) <= set(record) for form in FORMS)


def unknown_form(place: str, names: Iterable[str], *, table: bool = False) -> InvalidData:
    """The error for fields of no known form.

    Args:
        place: file and line.
        names: names of the fields.
        table: whether the names are those of a header.
    """
    names = list(names)
    noun, advice = ("columns", ", or say --no-header if this line is a pair") if table else ("fields", "")
    options = zip(("--source-field", "--target-field"), names, strict=False)
    example = " ".join(f"{option} {shlex.quote(cut(name))}" for option, name in options)
    return InvalidData(
        f"{place} has the {noun} {shown(names)}, and none is known as the source.",
        hint=f"Name them, for example {example}{advice}." if example else FIELDS_HINT,
    )


def _text_and_label(record: Record, extraction: Extraction) -> Iterator[Pair]:
    label = label_of(look_up(record, "label"), extraction) if extraction.need_targets else None
    yield extraction.pair(look_up(record, "text"), label)


def _languages(record: Record, extraction: Extraction) -> Iterator[Pair]:
    texts = look_up(record, TRANSLATION)
    names = texts if isinstance(texts, Mapping) else ()
    example = " --target-field ".join(list(names)[: 1 + extraction.need_targets])
    raise InvalidData(
        f"There are texts in the languages {shown(names)}, and nothing says which is the source.",
        hint=f"Say, for example, --source-field {cut(example)}." if names else FIELDS_HINT,
    )


def _conversations(title: str, key: str) -> Form:
    read = partial(_read_conversation, key=key)
    return Form(title, (key,), read, ("system", "tools", "functions", "chat_template_kwargs"), "conversation")


def _read_conversation(record: Record, extraction: Extraction, key: str) -> Iterator[Pair]:
    return conversation_in(record, key, extraction)


def _instructions(answer: str) -> Form:
    def read(record: Record, extraction: Extraction) -> Iterator[Pair]:
        return instruction_and_answer(record, answer, extraction)

    return Form("alpaca instructions", ("instruction", answer), read, ("input", "context", "system", "history"))


def _questions(answers: str) -> Form:
    def read(record: Record, extraction: Extraction) -> Iterator[Pair]:
        return question_and_answers(record, answers, extraction)

    return Form("questions and answers", ("question", answers), read, ("context", "is_impossible"), "question")


_SUMMARIES = [
    fields(text, summary, "texts and summaries")
    for text in ("article", "document", "dialogue", "text")
    for summary in ("summary", "highlights")
]

FORMS = (
    fields("source", "target", "pairs"),
    _conversations("OpenAI messages", "messages"),
    _conversations("ShareGPT conversations", "conversations"),
    Form(
        "prompts and completions",
        ("prompt", "completion"),
        prompt_and_completion,
        ("tools", "functions", "chat_template_kwargs"),
    ),
    _instructions("output"),
    _instructions("response"),
    fields("input", "output", "inputs and outputs"),
    _questions("answer"),
    _questions("answers"),
    Form("SQuAD articles", ("paragraphs",), articles, record="article"),
    Form("texts and labels", ("text", "label"), _text_and_label),
    *_SUMMARIES,
    Form("translations", (TRANSLATION,), _languages),
)
"""All forms that are recognised by their keys."""

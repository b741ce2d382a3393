"""Forms of records, which are recognised by their keys: one form a file.

A new form is one more entry of `FORMS`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from data_owner_client.data.reading.json_values import RepeatedKeys
from data_owner_client.data.reading.problems import InvalidText, require_unicode
from data_owner_client.data.reading.settings import ReadingSettings
from protocol.errors import InvalidData

Texts = tuple[object, object]
"""The values for source and target; they need not be texts. The target is None if it is not asked for."""
_NAMES_SHOWN = 12
_NAME_CHARACTERS = 40
_FIELDS_HINT = "Name the fields with --source-field and --target-field."


@dataclass(frozen=True)
class Form:
    """A form of records.

    Attributes:
        keys: keys by which it is recognised; the source is under the first.
        read: reads source and target of a record; the second argument says if the target is needed.
    """

    keys: tuple[str, ...]
    read: Callable[[Mapping[str, Any], bool], Texts]

    def __str__(self) -> str:
        return " and ".join(map(repr, self.keys))


def fields(source: str, target: str) -> Form:
    """The form of records with two named fields."""

    def read(record: Mapping[str, Any], need_target: bool) -> Texts:
        return look_up(record, source), look_up(record, target) if need_target else None

    return Form((source, target), read)


def look_up(record: Mapping[str, Any], name: str) -> object:
    """The value under a name: a key, keys joined by dots (`translation.en`), or a key of the field `translation`.

    Raises:
        InvalidText: there is none.
    """
    for path in ([name], name.split("."), [_TRANSLATION, name]):
        value: Any = record
        for key in path:
            _require_unique(value)
            if not isinstance(value, Mapping) or key not in value:
                break
            value = value[key]
        else:
            return value
    raise InvalidText(f"no field {shown([name])}", hint=f"It has {shown(record)}. {_FIELDS_HINT}")


def recognise(names: Collection[str], settings: ReadingSettings) -> Form | None:
    """The form of a record with these keys, or the one that the settings name; None if there is none.

    Raises:
        InvalidData: there are several.
    """
    if settings.source_field or settings.target_field:
        return fields(settings.source_field or "source", settings.target_field or "target")
    # All keys first: `source` beside `prompt` and `completion` says where a pair comes from. Then the source alone.
    whole = [form for form in FORMS if set(form.keys) <= set(names)]
    forms = whole or [form for form in FORMS if form.keys[0] in names]
    if len(forms) > 1:
        raise InvalidData(
            f"There are fields of several forms: {'; '.join(map(str, forms))}.",
            hint=f"The fields are {shown(names)}. {_FIELDS_HINT}",
        )
    return forms[0] if forms else None


def has_form(record: Mapping[str, Any], settings: ReadingSettings) -> bool:
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
    example = " ".join(f"{option} {shlex.quote(name[:_NAME_CHARACTERS])}" for option, name in options)
    return InvalidData(
        f"{place} has the {noun} {shown(names)}, and none is known as the source.",
        hint=f"Name them, for example {example}{advice}." if example else _FIELDS_HINT,
    )


def shown(names: Iterable[str]) -> str:
    """Names of fields for a message: quoted, and cut if they are long or many."""
    names = [repr(name[:_NAME_CHARACTERS]) for name in names]
    more = ", …" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more or "none"


_ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
_ROLES |= dict.fromkeys(("assistant", "gpt", "model"), "assistant")
# Parts of a turn that stand beside its text.
_OTHER_PARTS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def _conversation_in(key: str) -> Form:
    """The form of records with a list of turns under a key, perhaps with the system's text beside it."""

    def read(record: Mapping[str, Any], need_target: bool) -> Texts:
        source, target = _conversation(look_up(record, key), need_target)
        if record.get("tools") not in (None, [], "", "[]"):
            raise InvalidText("tools of its own", hint="Give the tools in the task, and leave them out here.")
        return _joined(record.get("system"), source), target

    return Form((key,), read)


def _conversation(turns: object, need_target: bool) -> Texts:
    """The user's turn and the assistant's. A system turn comes before the user's, with an empty line between."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise InvalidText("no list of turns", hint='For example [{"role": "user", "content": "…"}].')
    roles, texts = [_role(turn) for turn in turns], [_text(turn) for turn in turns]
    system = texts.pop(0) if roles[:1] == ["system"] else None
    roles = roles[-len(texts) :] if texts else []
    if roles != ["user", "assistant"] and (need_target or roles != ["user"]):
        raise _more_than_one_question()
    return _joined(system, texts[0]), texts[1] if need_target else None


def _more_than_one_question() -> InvalidText:
    return InvalidText(
        "a conversation that is not one question of the user and one answer of the assistant",
        hint="Give one question and one answer in each record; a system turn may come first.",
    )


def _role(turn: Mapping[str, Any]) -> str | None:
    return _ROLES.get(str(turn.get("role", turn.get("from"))))


def _text(turn: Mapping[str, Any]) -> object:
    _require_unique(turn)
    if any(turn.get(part) for part in _OTHER_PARTS):
        raise InvalidText("a turn with tool calls or thoughts", hint="Leave them out: only texts can be learned.")
    return _content(turn.get("content", turn.get("value")))


def _joined(first: object, second: object) -> object:
    """Two texts with an empty line between; the second alone if the first is blank or missing."""
    if first is None or (isinstance(first, str) and not first.strip()):
        return second
    require_unicode(first, "system")
    return f"{first}\n\n{second}" if isinstance(second, str) else second


def _prompt_and_completion(record: Mapping[str, Any], need_target: bool) -> Texts:
    """Two texts, or two lists of turns that follow each other."""
    prompt, completion = look_up(record, "prompt"), look_up(record, "completion") if need_target else None
    if isinstance(prompt, list) and isinstance(completion, list | None):
        return _conversation([*prompt, *(completion or [])], need_target)
    return prompt, completion


def _instruction_and_output(record: Mapping[str, Any], need_target: bool) -> Texts:
    """The instruction with its input behind it, and the output."""
    source, target = look_up(record, "instruction"), look_up(record, "output") if need_target else None
    if record.get("history"):
        raise _more_than_one_question()
    if isinstance(source, str) and record.get("input"):
        require_unicode(record["input"], "input")
        source = _joined(source, record["input"])
    return _joined(record.get("system"), source), target


def _content(content: object) -> object:
    """The content of a turn; the joined texts if it is a list of parts that are all texts."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        raise InvalidText("a turn with parts that are no texts", hint="Only texts can be learned.")
    return "".join(map(str, texts))


_TRANSLATION = "translation"


def _translation(record: Mapping[str, Any], need_target: bool) -> Texts:
    texts = look_up(record, _TRANSLATION)
    names = texts if isinstance(texts, Mapping) else ()
    example = " --target-field ".join(list(names)[:2]) if need_target else "".join(list(names)[:1])
    raise InvalidData(
        f"There are texts in the languages {shown(names)}, and nothing says which is the source.",
        hint=f"Say, for example, --source-field {example[:_NAME_CHARACTERS]}." if names else _FIELDS_HINT,
    )


def _require_unique(value: object) -> None:
    if isinstance(value, RepeatedKeys):
        raise InvalidText("a key twice", hint="Give every key once.")


FORMS = (
    fields("source", "target"),
    _conversation_in("messages"),
    _conversation_in("conversations"),
    Form(("prompt", "completion"), _prompt_and_completion),
    Form(("instruction", "output"), _instruction_and_output),
    Form((_TRANSLATION,), _translation),
)
"""All forms that are recognised by their keys."""

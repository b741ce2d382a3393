"""Kinds of task: what they fill into a task that leaves it open, and the form of their answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from data_owner_client.data.answer_form import AnswerForm
from data_owner_client.data.answer_schema import Schema, answer_schema
from data_owner_client.data.reading.fields import cut, shown
from data_owner_client.data.reading.problems import InvalidText, Origin, require_unicode
from data_owner_client.data.structured_answers import RepeatedKey, json_line, parse_json, parse_slots, slots_line

Kind = Literal["rewrite", "classify", "extract", "answer", "summarise", "chat"]
"""Kinds of task, which differ in the form of their answers and in their metrics."""

# Of the kinds that fill them in: the labels before source and target, and the instruction.
_DEFAULTS: dict[str, tuple[str, str, str]] = {
    "classify": ("Text", "Label", "Choose the label of the text{names}."),
    "extract": ("Text", "JSON", "Extract the fields of the text{names}. Write JSON in one line."),
    "answer": ("Question", "Answer", "Answer the question."),
    "summarise": ("Text", "Summary", "Summarise the text."),
}
# Where there are more labels, naming them would fill most of the prompt.
_MOST_NAMED = 20


def with_defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a task, as a file has them, with those that its kind fills in.

    Args:
        fields: fields by name, not yet checked.
    """
    kind = fields.get("kind")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        return dict(fields)
    source_label, target_label, instruction = _DEFAULTS[kind]
    instruction = instruction.format(names=_names(fields))
    return {"source_label": source_label, "target_label": target_label, "instruction": instruction, **fields}


def _names(fields: Mapping[str, Any]) -> str:
    """The labels, or else the keys of the schema, behind a colon; empty if there are none, or too many."""
    labels, schema = fields.get("labels"), fields.get("answer_schema")
    properties = schema.get("properties") if isinstance(schema, dict) else None
    names: Iterable[str] = properties if isinstance(properties, dict) else ()
    if isinstance(labels, list | tuple) and len(labels) <= _MOST_NAMED:
        names = map(str, labels)
    listed = ", ".join(names)
    return f": {listed}" if listed else ""


def require_fields_of_kind(kind: Kind, labels: Sequence[str], schema: Schema | None, stop: str | None) -> None:
    """Refuse labels and schemas that a task's kind does not have, or cannot answer with.

    Raises:
        ValueError: there are such.
    """
    if labels and kind != "classify":
        raise ValueError('labels need kind = "classify"')
    if schema is not None and kind != "extract":
        raise ValueError('answer_schema needs kind = "extract"')
    if len(labels) == 1:
        raise ValueError("labels has one label; a text needs at least two to choose from")
    for label, count in Counter(labels).items():
        if not label or label != label.strip():
            raise ValueError(f"the label {label!r} is empty, or has spaces around it")
        if count > 1:
            raise ValueError(f"labels has {label!r} {count} times")
        if stop and (label + stop).index(stop) < len(label):
            raise ValueError(f"the label {label!r} contains the stop {stop!r}, or ends with a part of it")
    if schema is not None:
        try:
            answer_schema(schema)
        except ValueError as error:
            raise ValueError(f"answer_schema: {error}") from error


def answer_text(
    kind: Kind, labels: Sequence[str], schema: Schema | None, target: str, origin: Origin | None = None
) -> str:
    """The target in the form that an adapter learns.

    JSON becomes one line with the keys in the schema's order, slots become one line, and other targets stay.

    Args:
        kind: kind of the task.
        labels: labels of the task; empty for any.
        schema: JSON schema of the answers; None for any JSON, or slots.
        target: the target as it was read.
        origin: position of the target; None if the caller knows it.

    Raises:
        InvalidText: the target is no label of the task, is neither JSON nor slots, has a key twice, or violates the
            schema; or decoding that is held to the schema could not write it.
    """
    if kind == "classify" and labels and target not in labels:
        # One kind of problem, as a file for another task has as many such labels as pairs.
        hint = f"{cut(target)!r} is none of {shown(labels)}."
        raise InvalidText("a label that the task does not have", hint=hint, origin=origin)
    if kind != "extract":
        return target
    try:
        return _structured(target, schema, origin)
    except RecursionError as error:
        hint = "Leave it out, or flatten it."
        raise InvalidText("a target that nests too deep", hint=hint, origin=origin) from error


def _structured(target: str, schema: Schema | None, origin: Origin | None) -> str:
    try:
        value = parse_json(target, unique_keys=True)
    except RepeatedKey as error:
        raise InvalidText("a target that has a key twice", hint="Give every key once.", origin=origin) from error
    except ValueError:
        return _slots(target, schema, origin)
    if schema is not None:
        prepared = answer_schema(schema)
        if violation := prepared.violation(value):
            hint = "Correct the target, or the task's answer_schema."
            raise InvalidText(f"a target that violates the answer_schema at {violation}", hint=hint, origin=origin)
        value = prepared.ordered(value)
    line = json_line(value)
    require_unicode(line, "the target", origin)
    if schema is not None and (rest := AnswerForm(schema).unwritable_part(line)):
        hint = f"Correct the target, or the task's answer_schema, which does not allow {rest!r:.40}."
        raise InvalidText("a target that decoding cannot be held to", hint=hint, origin=origin)
    return line


def _slots(target: str, schema: Schema | None, origin: Origin | None) -> str:
    try:
        if schema is None:
            return slots_line(parse_slots(target))
    except ValueError as error:
        hint = "Write JSON, or slots such as `name: lamp; color: red`."
        raise InvalidText("a target that is neither JSON nor slots", hint=hint, origin=origin) from error
    raise InvalidText("a target that is no JSON", hint="The task's answer_schema wants JSON.", origin=origin)

"""Fields of records: values under names, and their texts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from data_owner_client.data.pairs import Pair
from data_owner_client.data.reading.json_values import RepeatedKeys
from data_owner_client.data.reading.problems import InvalidText, Origin, require_unicode

TRANSLATION = "translation"
"""Field of records whose texts are under the names of their languages."""
FIELDS_HINT = "Name the fields with --source-field and --target-field."
_NAMES_SHOWN = 12
_NAME_CHARACTERS = 40
# Removed around a text. Other spaces, such as U+00A0 and U+3000, are a part of it.
TRIMMED = " \t\r\n"
_PYTHON = re.compile(r"\s*[\[{]\s*['{]")

Record = Mapping[str, Any]


@dataclass
class Extraction:
    """Rules for the pairs of one file's records, and a count of the answers that the file excludes.

    Attributes:
        need_targets: whether each pair must have a target; if False, sources may be blank.
        trim: remove spaces, tabs and line ends around a text.
        labels: names of the labels of a classification, in the order of their numbers; empty if the file has names.
        origin: position of the record that is read.
        unlearned: answers so far that the file excludes from learning.
    """

    need_targets: bool = True
    trim: bool = True
    labels: tuple[str, ...] = ()
    origin: Origin | None = None
    unlearned: int = 0

    def pair(self, source: object, target: object, *, references: Iterable[str] = (), group: str = "") -> Pair:
        """The pair of a source and a target, which must be texts. The target is ignored if none is needed.

        Raises:
            InvalidText: a value is no text, or blank.
        """
        source_text = usable_text(source, "source", blank=not self.need_targets, trim=self.trim)
        if not self.need_targets:
            return Pair(source_text, None, self.origin)
        target_text = usable_text(json_text(target), "target")
        others = dict.fromkeys(usable_text(each, "target") for each in references)
        others.pop(target_text, None)
        return Pair(source_text, target_text, self.origin, references=tuple(others), group=group)


def look_up(record: Record, name: str) -> object:
    """The value under a name: a key, keys joined by dots (`translation.en`), or a key of the field `translation`.

    Raises:
        InvalidText: there is none.
    """
    for path in ([name], name.split("."), [TRANSLATION, name]):
        value: Any = record
        for key in path:
            require_unique(value)
            if not isinstance(value, Mapping) or key not in value:
                break
            value = value[key]
        else:
            return value
    raise InvalidText(f"no field {shown([name])}", hint=f"It has {shown(record)}. {FIELDS_HINT}")


def usable_text(value: object, name: str, *, blank: bool = False, trim: bool = True) -> str:
    """The text of a field.

    Args:
        value: value of the field.
        name: name of the field in errors.
        blank: whether it may be blank.
        trim: remove spaces, tabs and line ends around it.

    Raises:
        InvalidText: it is no text, or blank.
    """
    require_unicode(value, name)
    text = str(value)
    if not blank and not text.strip():
        raise InvalidText(f"an empty {name}", hint="Every pair needs two texts.")
    return text.strip(TRIMMED) if trim else text


def joined(first: object, second: object, name: str) -> object:
    """Two texts with an empty line between; the second alone if the first is blank or missing.

    Args:
        first: text that may be missing.
        second: value behind it.
        name: name of the first in errors.

    Raises:
        InvalidText: the first is no text.
    """
    if is_missing(first):
        return second
    require_unicode(first, name)
    return f"{first}\n\n{second}" if isinstance(second, str) else second


def is_missing(value: object) -> bool:
    """Return True for null, a blank text, and an empty list or object."""
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {})


def parsed(value: object) -> object:
    """The list or object of a field of a table, which is written as JSON; other values as they are."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def json_text(value: object) -> object:
    """An object, or a list of objects, as JSON text, as answers with fields are learned; other values as they are.

    Raises:
        InvalidText: an object has a key twice.
    """
    objects = value if isinstance(value, list) else [value]
    if not objects or not all(isinstance(each, Mapping) for each in objects):
        return value
    _require_unique_inside(value)
    return json.dumps(value, ensure_ascii=False)


def _require_unique_inside(value: object) -> None:
    require_unique(value)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for part in parts:
        _require_unique_inside(part)


def require_json(value: object) -> None:
    """Refuse lists and objects that a table has as Python wrote them, such as `{'text': ['a']}`.

    Raises:
        InvalidText: the value is such a text.
    """
    if isinstance(value, str) and _PYTHON.match(value):
        raise InvalidText(
            "a list or an object as Python writes it",
            hint="Write JSON into the cells of the table, or save the data as JSON lines or Parquet.",
        )


def require_unique(value: object) -> None:
    """Refuse a JSON object that has a key twice.

    Raises:
        InvalidText: it has.
    """
    if isinstance(value, RepeatedKeys):
        raise InvalidText("a key twice", hint="Give every key once.")


def shown(names: Iterable[str]) -> str:
    """Names of fields for a message: quoted, and cut if they are long or many."""
    names = list(names)
    more = ", …" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(repr(cut(name)) for name in names[:_NAMES_SHOWN]) + more or "none"


def cut(name: str) -> str:
    """A name of a length that a message can hold."""
    return name[:_NAME_CHARACTERS]

"""Labels of a classification: names, or numbers of names."""

from __future__ import annotations

from data_owner_client.data.reading.fields import Extraction, shown
from data_owner_client.data.reading.problems import InvalidText

_NAMES_HINT = "Give the names in the order of the numbers, from 0: --labels negative positive."


def label_of(value: object, extraction: Extraction) -> object:
    """The name of a label. A number is the place of its name, from 0, unless it is a name itself.

    Raises:
        InvalidText: a number has no name, or the name is none of the labels.
    """
    names = extraction.labels
    number = _number(value)
    if not names:
        if number is not None:
            raise InvalidText("a number in place of a label's name", hint=_NAMES_HINT)
        return value
    spelling = value.strip() if isinstance(value, str) else str(number)
    if spelling in names:
        return spelling
    if number is not None and 0 <= number < len(names):
        return names[number]
    if number is None and not isinstance(value, str):
        return value  # no text, which has its own error
    raise InvalidText("a label that is none of --labels", hint=f"They are {shown(names)}.")


def _number(value: object) -> int | None:
    """The whole number of a label: a number, a truth value, or the digits of a table's field."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str):
        digits = value.strip().removesuffix(".0")  # as tables have numbers beside empty fields
        return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 9 else None
    return int(value) if isinstance(value, int) else None

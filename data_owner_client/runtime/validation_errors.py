"""Errors of pydantic as messages of one line."""

from __future__ import annotations

from pydantic import ValidationError

_OWN_ERROR = "Value error, "


def first_message(error: ValidationError) -> str:
    """The message of the first error, without the prefix that pydantic writes before those of validators."""
    return str(error.errors()[0]["msg"]).removeprefix(_OWN_ERROR)

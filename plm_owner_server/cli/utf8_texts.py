"""Texts of the command line and the environment that must be UTF-8."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationInfo, field_validator


class Utf8Texts(BaseModel):
    """Base of commands whose texts must be UTF-8. A path may be any bytes, as may the URL of an SQLite file."""

    @field_validator("*")
    @classmethod
    def _is_utf8(cls, value: Any, info: ValidationInfo) -> Any:
        try:
            if isinstance(value, str) and info.field_name != "store":
                value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{value!r} is not UTF-8") from None
        return value

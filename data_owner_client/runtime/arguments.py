"""Arguments of the Python functions: paths in the forms in which users have them, and paths in place of objects."""

from __future__ import annotations

import os
from pathlib import Path

from protocol.errors import InvalidData

AnyPath = str | os.PathLike[str]
"""A path as Python's `open` takes it."""


def to_path(path: AnyPath) -> Path:
    """The path, with the home folder in place of a `~` at its beginning."""
    # Path.expanduser raises an error for unknown users; this leaves their names.
    return Path(os.path.expanduser(path))


def require_loaded(value: object, name: str, loader: str) -> None:
    """Refuse a path where its contents are needed.

    Args:
        value: argument that was given.
        name: name of the argument in the message.
        loader: call that reads the contents.

    Raises:
        InvalidData: the value is a path.
    """
    if isinstance(value, str | os.PathLike):
        raise InvalidData(f"{name} is the path {str(value)!r}.", hint=f"Read it first: {loader}.")

"""Atomic file writes: a kill at any moment leaves the old or the new content, never a part."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from protocol.errors import InvalidData


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to the disk and rename it.

    Raises:
        InvalidData: the disk is full, or the folder is not writable.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise InvalidData(
            f"{path} cannot be written: {error.strerror}.",
            hint="Make room or give another folder, then run this again.",
        ) from error

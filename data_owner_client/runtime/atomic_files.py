"""Atomic file writes: a kill at any moment leaves the old or the new content, never a part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from protocol.errors import InvalidData


@contextmanager
def open_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing under a temporary name; at the end, flush it to the disk and rename it.

    Raises:
        InvalidData: the disk is full, or the folder is not writable.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise InvalidData(
            f"{path} cannot be written: {error.strerror}.",
            hint="Make room or give another folder, then run this again.",
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file as `open_atomically` does.

    Raises:
        InvalidData: the disk is full, or the folder is not writable.
    """
    with open_atomically(path) as file:
        file.write(data)

"""Atomic file writes: a kill at any moment leaves the old or the new content, never a part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from protocol.errors import InvalidData


def is_replaceable(path: Path) -> bool:
    """True for a regular file or a free name; False for pipes, folders, and devices such as `/dev/null`."""
    return path.is_file() or not path.exists()


@contextmanager
def open_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing under a temporary name; at the end, flush it to the disk and rename it.

    A link stays, and the file that it names is replaced. A pipe or device is written to as it is.

    Raises:
        InvalidData: the disk is full, or the folder is not writable.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        if not is_replaceable(path):
            with path.open("wb") as file:
                yield file
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
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


def require_writable(folder: Path) -> None:
    """Create a folder if it is missing, and check that files can be written there.

    Raises:
        InvalidData: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidData(f"{folder} cannot be written: {error.strerror}.", hint="Give another folder.") from error

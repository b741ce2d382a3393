"""The secret key of a memory's surrogates, in a file that never leaves the client."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from protocol.errors import InvalidData

KEY_FILE = "redaction.key"
_BYTES = 32


def new_key() -> bytes:
    """A key: 32 random bytes."""
    return secrets.token_bytes(_BYTES)


def replace_key(folder: Path, key: bytes) -> None:
    """Store a key in a folder, in place of the one that is there.

    Raises:
        InvalidData: the folder cannot be written.
    """
    path = folder / KEY_FILE
    partial = folder / f".{KEY_FILE}.{os.getpid()}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        _write(partial, key)
        os.replace(partial, path)
    except OSError as error:
        raise _inaccessible(path, error) from error


def open_key(folder: Path, *, is_begun: bool = False) -> bytes:
    """The key of a folder, which only the user may read. It is made where there is none.

    Args:
        folder: folder of the memories; created if it is missing.
        is_begun: whether the folder has surrogates of a key already, so that no other will do.

    Raises:
        InvalidData: the key is missing or damaged, or cannot be read or written.
    """
    path = folder / KEY_FILE
    if is_begun and not path.exists():
        raise InvalidData(
            f"{path} is missing, and with another key the owner would see other surrogates.",
            hint="Put it back, or build the memory again: build-memory --overwrite.",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _write(path, key := new_key())
        except FileExistsError:
            key = path.read_bytes()
    except OSError as error:
        raise _inaccessible(path, error) from error
    if len(key) != _BYTES:
        raise InvalidData(f"{path} is damaged.", hint="Build the memory again: build-memory --overwrite.")
    return key


def _write(path: Path, key: bytes) -> None:
    """Write a file that is not there yet: never over a key that another process may have begun to use."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key)
        file.flush()
        os.fsync(file.fileno())


def _inaccessible(path: Path, error: OSError) -> InvalidData:
    return InvalidData(f"{path} cannot be read or written: {error.strerror}.", hint="Give another --memory folder.")

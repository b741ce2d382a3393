"""The secret key of a memory's surrogates, in a file that never leaves the client."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from protocol.errors import InvalidData

KEY_FILE = "redaction.key"
_BYTES = 32


def open_key(folder: Path, *, renew: bool, is_begun: bool = False) -> bytes:
    """The key of a folder: 32 random bytes, which only the user may read. It is made where there is none.

    Args:
        folder: folder of the memories; created if it is missing.
        renew: delete the folder's key first.
        is_begun: whether the folder has surrogates of a key already, so that no other will do.

    Raises:
        InvalidData: the key is missing or damaged, or cannot be read or written.
    """
    path = folder / KEY_FILE
    if is_begun and not renew and not path.exists():
        raise InvalidData(
            f"{path} is missing, and with another key the owner would see other surrogates.",
            hint="Put it back, or build the memory again: build-memory --overwrite.",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if renew:
            path.unlink(missing_ok=True)
        try:
            # Never a key that another process may have begun to use.
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            key = path.read_bytes()
        else:
            with os.fdopen(file, "wb") as new:
                new.write(key := secrets.token_bytes(_BYTES))
                new.flush()
                os.fsync(new.fileno())
    except OSError as error:
        raise InvalidData(
            f"{path} cannot be read or written: {error.strerror}.", hint="Give another --memory folder."
        ) from error
    if len(key) != _BYTES:
        raise InvalidData(f"{path} is damaged.", hint="Build the memory again: build-memory --overwrite.")
    return key

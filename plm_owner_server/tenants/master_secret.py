"""Master secret of the tenants' rotations: a setting, or a file made once next to a SQLite store."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

import sqlalchemy as sa

from plm_owner_server.settings import ServerSettings
from plm_owner_server.tenants.database import is_sqlite
from plm_owner_server.tenants.store import TenantRecord
from protocol.errors import PemaError, Unsupported

_BYTES = 32


def master_secret(settings: ServerSettings) -> bytes:
    """The server's master secret.

    Raises:
        Unsupported: the setting is missing, and the store is shared with servers that could not read a file made here.
        PemaError: the secret's file cannot be read or written.
    """
    if settings.master_secret is not None:
        return settings.master_secret.get_secret_value().encode()
    database = sa.make_url(settings.store)
    if not is_sqlite(database):
        raise Unsupported(
            "This server has no master secret to rotate with.",
            hint="Its owner sets PEMA_MASTER_SECRET to the same value for all servers that share the store.",
        )
    path = Path(f"{database.database}.secret")
    try:
        if not path.exists():
            _make(path)
        secret = path.read_bytes().strip()  # a file that was restored by hand may end in a newline
    except OSError as error:
        raise PemaError(
            f"The master secret in {path} cannot be used: {error.strerror}.",
            hint="Repair its permissions, or set PEMA_MASTER_SECRET.",
        ) from error
    if len(secret) != 2 * _BYTES:
        raise PemaError(
            f"The master secret in {path} is damaged.",
            hint="Restore it from a backup. Memories and adapters of rotated tenants fit no other secret.",
        )
    return secret


def require_master_secret(settings: ServerSettings, tenants: Sequence[TenantRecord]) -> None:
    """Check at the start that a master secret exists if any tenant's answers are rotated.

    Raises:
        PemaError: a tenant is rotated, and there is no master secret; see `master_secret`.
    """
    if any(tenant.disclosure.rotated for tenant in tenants):
        master_secret(settings)


def _make(path: Path) -> None:
    """Write the file whole or not at all, readable by its owner alone. Of several servers at once, the first wins."""
    with NamedTemporaryFile(dir=path.parent) as file:  # readable by this user alone
        file.write(secrets.token_hex(_BYTES).encode())
        file.flush()
        os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(file.name, path)

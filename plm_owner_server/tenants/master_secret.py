"""The secret that the tenants' rotations follow from: given, or made once and kept beside a store of this machine's."""

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
        Unsupported: none is given, and the store is shared with servers that could not know one made here.
        PemaError: its file cannot be read or written.
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
        kept = path.read_bytes()
    except OSError as error:
        raise PemaError(
            f"The master secret in {path} cannot be had: {error.strerror}.", hint="Mend it, or set PEMA_MASTER_SECRET."
        ) from error
    if len(kept) != 2 * _BYTES:
        raise PemaError(
            f"The master secret in {path} is damaged.",
            hint="Put it back from a backup: with another one, memories and adapters of rotated tenants fit no more.",
        )
    return kept


def require_master_secret(settings: ServerSettings, tenants: Sequence[TenantRecord]) -> None:
    """Let no server start that could not answer a tenant in its secret basis.

    Raises:
        PemaError: there is such a tenant, and no master secret; see `master_secret`.
    """
    if any(tenant.disclosure.rotated for tenant in tenants):
        master_secret(settings)


def _make(path: Path) -> None:
    """Whole or not at all, for the owner's eyes alone; of several servers that start at once, one's is taken."""
    with NamedTemporaryFile(dir=path.parent) as file:  # which nobody else may read
        file.write(secrets.token_hex(_BYTES).encode())
        file.flush()
        os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(file.name, path)

"""Keys of tenants: `pema_`, a public part that identifies the tenant, and a secret part that is stored as a hash."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from typing import Self

_ID_BYTES = 8
# Too many for any search, so one fast hash is enough: slow hashes are for passwords that people choose.
_SECRET_BYTES = 32
_KEY = re.compile(r"pema_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")


@dataclass(frozen=True)
class Key:
    """A key in its parts.

    Attributes:
        id: public part, 16 hexadecimal digits, stored as it is.
        secret: secret part, shown once and never stored.
    """

    id: str
    secret: str

    @classmethod
    def new(cls) -> Self:
        """A random key."""
        return cls(secrets.token_hex(_ID_BYTES), secrets.token_urlsafe(_SECRET_BYTES))

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The key that a text spells; None if it spells none."""
        match = _KEY.fullmatch(text)
        return cls(*match.groups()) if match else None

    def __str__(self) -> str:
        """The key as clients send it."""
        return f"pema_{self.id}_{self.secret}"

    def __repr__(self) -> str:
        """The public part alone, as the text could end up in a log."""
        return f"Key({self.id})"

    @property
    def hash(self) -> str:
        """SHA-256 of the secret in hexadecimal, as stored."""
        return hashlib.sha256(self.secret.encode()).hexdigest()

    def matches(self, stored_hash: str) -> bool:
        """Compare the secret's hash with a stored one, in constant time."""
        return hmac.compare_digest(self.hash, stored_hash)

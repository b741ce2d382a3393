"""Keys of tenants: `pema_`, a public part by which a tenant is found, and a secret one of which only a hash is kept."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from typing import Self

_ID_BYTES = 8
# More than any search gets through, so one fast hash is enough: slow ones are for what people think up.
_SECRET_BYTES = 32
_KEY = re.compile(r"pema_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")


@dataclass(frozen=True)
class Key:
    """A key in its parts.

    Attributes:
        id: public; in the store as it is.
        secret: shown once, and kept nowhere.
    """

    id: str
    secret: str

    @classmethod
    def new(cls) -> Self:
        """A random key."""
        return cls(secrets.token_hex(_ID_BYTES), secrets.token_urlsafe(_SECRET_BYTES))

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """A key from its text; None if it is none."""
        match = _KEY.fullmatch(text)
        return cls(*match.groups()) if match else None

    def __str__(self) -> str:
        """As clients show it."""
        return f"pema_{self.id}_{self.secret}"

    def __repr__(self) -> str:
        """Without the secret: it could end up in a log."""
        return f"Key({self.id})"

    @property
    def hash(self) -> str:
        """SHA-256 of the secret, which the store keeps."""
        return hashlib.sha256(self.secret.encode()).hexdigest()

    def matches(self, kept: str) -> bool:
        """Whether this is the key of which that hash is kept; in constant time."""
        return hmac.compare_digest(self.hash, kept)

"""What a URL says of the way there."""

from __future__ import annotations

from contextlib import suppress
from urllib.parse import urlsplit

from protocol import addresses


def is_loopback(url: str) -> bool:
    """Whether a URL's host is this very machine."""
    with suppress(ValueError):
        return addresses.is_loopback(urlsplit(url).hostname or "")
    return False

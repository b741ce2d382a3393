"""Facts about the network path that a host name or a URL gives away."""

from __future__ import annotations

import ipaddress
from contextlib import suppress
from urllib.parse import urlsplit


def is_loopback(address: str) -> bool:
    """True if a host name, an IP address or a URL means this machine itself."""
    with suppress(ValueError):
        host = (urlsplit(address).hostname or "") if "://" in address else address
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    return False

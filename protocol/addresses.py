"""Names and IP addresses of hosts."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """True if a host name or an IP address means this machine itself.

    127.0.0.0/8, ::1, `localhost` and the names below it, which RFC 6761 reserves for this machine.
    """
    name = host.lower().removesuffix(".")
    address = ip_address(name)
    if address is None:
        return name == "localhost" or name.endswith(".localhost")
    return address.is_loopback


def ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that a host is written as, IPv4 where IPv6 only wraps it; None for a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def authority(host: str, port: int) -> str:
    """Host and port as in a URL, with brackets around an IPv6 address, which has none in `host`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

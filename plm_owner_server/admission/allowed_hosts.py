"""Host names by which a server without keys may be called.

A web page whose name is pointed to this machine (DNS rebinding) could otherwise call the server from the browser of
anybody here. Its requests name the page's host. gRPC needs no such check: browsers send it only with TLS, where the
certificate must name the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from plm_owner_server.settings import ServerSettings
from protocol.addresses import ip_address, is_loopback
from protocol.errors import Misdirected

# Endings of names that no public web page has: RFC 6762 (also of Kubernetes' Services), RFC 8375, and ICANN's choice.
_PRIVATE = (".local", ".home.arpa", ".internal")


class AllowedHosts:
    """Rule for the hosts that requests may name. Loopback hosts are always allowed, with any port.

    Args:
        named: names that the owner allows; `*.example.com` allows all names below it, and `*` every host.
        local_network: also allow IP addresses, names without a dot and names of private networks. No page of the
            public web has such a host, and probes, containers and clusters use them.
    """

    def __init__(self, named: Sequence[str] = (), *, local_network: bool = False) -> None:
        self._named = frozenset(_canonical(name if ip_address(name) else _host(name)) for name in named)
        self._local_network = local_network

    def check(self, host: str | None, origin: str | None = None) -> None:
        """Check the hosts that a request names.

        Args:
            host: value of the `Host` header; None without one, which no browser sends.
            origin: value of the `Origin` header, which browsers send for web pages.

        Raises:
            Misdirected: one of them is not allowed.
        """
        page = None if origin is None else origin.partition("://")[2]
        if not all(self.allows(authority) for authority in (host, page) if authority is not None):
            raise Misdirected(
                "The request is for a host, or from a web page, that this server does not answer.",
                hint="Use http://127.0.0.1 or localhost. For another name, the owner sets --allowed-hosts NAME.",
            )

    def allows(self, authority: str) -> bool:
        """Return whether a request may name this host.

        Args:
            authority: a host, with or without a port.
        """
        if "*" in self._named:
            return True
        host = _canonical(_host(authority))
        if not host:
            return False
        if is_loopback(host) or host in self._named:
            return True
        if self._local_network and (ip_address(host) or "." not in host or host.endswith(_PRIVATE)):
            return True
        return any(f"*.{host.split('.', level)[-1]}" in self._named for level in range(1, host.count(".") + 1))


def allowed_hosts_for(settings: ServerSettings) -> AllowedHosts:
    """The rule of a server without keys.

    With TLS there is none, because a certificate names the hosts.
    """
    if settings.tls_certificate is not None:
        return ANY_HOST
    return AllowedHosts([*settings.allowed_hosts, settings.host], local_network=not is_loopback(settings.host))


def metrics_hosts_for(settings: ServerSettings) -> AllowedHosts:
    """The rule of the metrics' port, which has neither keys nor TLS."""
    host = settings.metrics_host
    return AllowedHosts([*settings.allowed_hosts, host], local_network=not is_loopback(host))


def _canonical(host: str) -> str:
    """The shortest form of an IP address; a name as it is."""
    return str(ip_address(host) or host)


def _host(authority: str) -> str:
    """The host without its port, in lower case; empty if there is none."""
    if not authority.isascii() or any(character in authority for character in "@/?#\\ \t"):
        return ""
    try:
        return (urlsplit(f"//{authority}").hostname or "").removesuffix(".")
    except ValueError:
        return ""


ANY_HOST = AllowedHosts(["*"])
"""No restriction."""

"""The proxy of the environment for one server, by one rule for both transports.

gRPC and httpx read the variables by rules of their own, which differ. So both get the outcome of this module.
"""

from __future__ import annotations

import ipaddress
import os
import re
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import httpx

from data_owner_client.plm.connection.network.address import ServerAddress
from protocol.addresses import authority, ip_address
from protocol.errors import InvalidRequest

# httpx's names of the schemes that users write. SOCKS has no other version with names, as servers have them.
_SCHEMES = {"http": "http", "https": "https", "socks": "socks5", "socks5": "socks5", "socks5h": "socks5h"}
_DEFAULT_PORTS = {"http": 80, "https": 443}
_SOCKS_PORT = 1080


@dataclass(frozen=True)
class Proxy:
    """A proxy.

    Attributes:
        scheme: http, https, socks5 or socks5h.
        authority: host and port.
        userinfo: user name and password as in a URL, percent-encoded; empty if there are none.
        source: the variable that names it, or `the system's settings`.
    """

    scheme: str
    authority: str
    userinfo: str = field(repr=False)
    source: str

    @property
    def is_socks(self) -> bool:
        """True if it speaks SOCKS."""
        return self.scheme.startswith("socks")

    @property
    def url(self) -> str:
        """The whole URL, with the password."""
        return f"{self.scheme}://{self.userinfo}{'@' if self.userinfo else ''}{self.authority}"

    def __str__(self) -> str:
        """The proxy in words, without its password."""
        return f"proxy {self.scheme}://{self.authority} of {self.source}"


def proxy_for(address: ServerAddress) -> Proxy | None:
    """The proxy for a server, from the environment, or on macOS and Windows from the system; None for none.

    What goes to this machine takes none. Of the variables `grpc_proxy` (gRPC only), `http_proxy` or, with TLS,
    `https_proxy`, and `all_proxy`, the first that is set counts. `no_proxy` lists exceptions, or for gRPC
    `no_grpc_proxy` if it is set. Names in small letters go before those in capitals.

    Raises:
        InvalidRequest: the variable holds no URL of a proxy, or gRPC cannot use this one.
    """
    if address.is_local:
        return None
    proxies = urllib.request.getproxies()
    if _is_exempt(address, proxies):
        return None
    kinds = ["grpc"] * address.is_grpc + ["https" if address.is_encrypted else "http", "all"]
    kind = next((kind for kind in kinds if proxies.get(kind, "").strip()), None)
    if kind is None:
        return None
    proxy = _parse(proxies[kind].strip(), _source(kind))
    if address.is_grpc and proxy.scheme != "http":
        raise InvalidRequest(
            f"gRPC cannot go through the {proxy}, as it takes only http:// proxies.",
            hint=f"Use the owner's https:// address, or reach the server without a proxy: NO_PROXY={address.host}.",
        )
    return proxy


def _source(kind: str) -> str:
    name = f"{kind}_proxy"
    return next((each for each in (name, name.upper()) if os.environ.get(each)), "the system's settings")


def _parse(value: str, source: str) -> Proxy:
    # The value is not quoted: it may hold a password.
    no_proxy = InvalidRequest(
        f"{source} does not hold the address of a proxy.",
        hint="Set it to one like http://proxy.example.com:3128 or socks5://proxy.example.com:1080, or unset it.",
    )
    try:
        url = httpx.URL(value if "://" in value else f"http://{value}")
    except httpx.InvalidURL as error:
        raise no_proxy from error
    host = url.raw_host.decode("ascii")
    scheme = _SCHEMES.get(url.scheme)
    port = url.port or _DEFAULT_PORTS.get(url.scheme, _SOCKS_PORT)
    if scheme is None or not host or "%" in host or not 0 < port < 2**16:
        raise no_proxy
    return Proxy(scheme, authority(host, port), url.userinfo.decode("ascii"), source)


def _is_exempt(address: ServerAddress, proxies: dict[str, str]) -> bool:
    kind = "no_grpc" if address.is_grpc and "no_grpc" in proxies else "no"
    if kind in proxies:
        return any(_covers(entry, address) for entry in re.split(r"[,;\s]+", proxies[kind].lower()) if entry)
    return bool(urllib.request.proxy_bypass(address.authority))  # the exceptions of macOS and Windows


def _covers(entry: str, address: ServerAddress) -> bool:
    """True if an entry of NO_PROXY covers a server.

    An entry is a name that covers the names below it, too (`example.com`, `.example.com`, `*.example.com`), an IP
    address, a network (`10.0.0.0/8`), or a pattern (`*`, `10.0.*`). A name or an address may have a port. A scheme
    before it and a slash behind it do not count.
    """
    entry = entry.rpartition("://")[2].rstrip("/")
    ip, network = ip_address(address.host), _network(entry.strip("[]"))
    if network is not None:
        return ip is not None and ip in network
    name, _, port = entry.rpartition(":") if re.search(r":\d+$", entry) else (entry, "", "")
    if port and int(port) != address.port:
        return False
    if "*" in name and fnmatchcase(address.host, name):
        return True
    if ip is not None:
        return ip == ip_address(name.strip("[]"))
    name, host = name.removeprefix("*").strip("."), address.host.strip(".")
    return bool(name) and (host == name or host.endswith(f".{name}"))


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    with suppress(ValueError):
        return ipaddress.ip_network(text, strict=False)
    return None

"""Addresses of servers."""

from __future__ import annotations

from dataclasses import dataclass

import httpx

from protocol.addresses import authority, ip_address, is_loopback
from protocol.errors import InvalidRequest

_DEFAULT_PORTS = {"http": 80, "https": 443, "grpcs": 443}
_SCHEMES = ("http", "https", "grpc", "grpcs")
_HINT = "Give one like http://127.0.0.1:8000, grpc://127.0.0.1:8001 or https://plm.example.com."


@dataclass(frozen=True)
class ServerAddress:
    """The address of a server.

    Attributes:
        scheme: http, https, grpc or grpcs.
        host: name in ASCII, or IP address without brackets, in small letters.
        port: TCP port.
        path: prefix of the paths of all calls, without a slash at its end; empty for gRPC.
    """

    scheme: str
    host: str
    port: int
    path: str = ""

    @classmethod
    def parse(cls, url: str) -> ServerAddress:
        """Read a URL.

        Raises:
            InvalidRequest: it is not the URL of a server, or has parts that a server's address cannot have.
        """
        text = url.strip()
        try:
            parsed = httpx.URL(text)
        except httpx.InvalidURL as error:
            raise InvalidRequest(f"{text!r} is not the address of a PLM server: {error}.", hint=_HINT) from error
        host = parsed.raw_host.decode("ascii").lower()
        if parsed.userinfo:
            raise InvalidRequest(
                f"The address of the server {host} has a user name or password in it.",
                hint="Leave it out; a key goes into PEMA_API_KEY or --api-key.",
            )
        if parsed.scheme not in _SCHEMES or not host or "%" in host or any(map(str.isspace, text)):
            raise InvalidRequest(f"{text!r} is not the address of a PLM server.", hint=_HINT)
        if parsed.query or parsed.fragment:
            raise InvalidRequest(f"The address {text} has a part after ? or #.", hint="Leave that part out.")
        port = parsed.port or _DEFAULT_PORTS.get(parsed.scheme)
        path = parsed.path.rstrip("/")
        address = cls(parsed.scheme, host, port or 0, path)
        if port is None or not 0 < port < 2**16:
            raise InvalidRequest(f"The address {text} has no usable port.", hint=f"Ask the owner for it. {_HINT}")
        if address.is_grpc and path:
            raise InvalidRequest(
                f"The address {text} has a path, which gRPC cannot take.",
                hint=f"Use {address.scheme}://{address.authority}, or the owner's https:// address.",
            )
        return address

    @property
    def is_grpc(self) -> bool:
        """True if the calls go over gRPC."""
        return self.scheme in ("grpc", "grpcs")

    @property
    def is_encrypted(self) -> bool:
        """True if the connection is over TLS."""
        return self.scheme in ("https", "grpcs")

    @property
    def is_local(self) -> bool:
        """True if the address means this machine: a loopback address, or 0.0.0.0 or ::, which reach it, too."""
        address = ip_address(self.host)
        return is_loopback(self.host) or (address is not None and address.is_unspecified)

    @property
    def authority(self) -> str:
        """Host and port, as gRPC takes them."""
        return authority(self.host, self.port)

    @property
    def url(self) -> str:
        """The address as a URL, without a slash at its end and without the port that its scheme has anyway."""
        default_port = f":{_DEFAULT_PORTS.get(self.scheme)}"
        return f"{self.scheme}://{self.authority.removesuffix(default_port)}{self.path}"

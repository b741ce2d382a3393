"""The way to a server, and the error for everything that happens on it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Self

from data_owner_client.plm.connection.network.address import ServerAddress
from data_owner_client.plm.connection.network.proxies import Proxy, proxy_for
from data_owner_client.plm.connection.network.trust import TrustedRoots, trusted_roots
from data_owner_client.plm.connection.settings import ConnectionSettings
from protocol.errors import (
    ConnectionFailed,
    Forbidden,
    GatewayFailed,
    GatewayTimeout,
    InvalidRequest,
    NotReady,
    Overloaded,
    PayloadTooLarge,
    PemaError,
    ProtocolViolation,
    RequestTimeout,
    ServerFault,
    TimedOut,
    Unauthenticated,
    Untrusted,
)

_OTHER_TRANSPORT = "Another protocol is spoken there: REST and gRPC have a port each."
_OTHER_SCHEMES = {"http": "grpc", "https": "grpcs", "grpc": "http", "grpcs": "https"}
# Signs in the messages of libraries, and what they mean.
_REASONS = (
    (("http/2", "illegal request line"), _OTHER_TRANSPORT),
    (("service not known", "nodename nor", "name resolution", "address lookup"), "The name is not known."),
    (("connection refused",), "The machine is there, but nothing listens on this port."),
    (
        ("certificate", "ssl", "handshake"),
        "The connection could not be encrypted as the certificate says, or nothing is encrypted on this port.",
    ),
    (("no route", "unreachable"), "The network has no way there."),
    (("timed out", "timeout", "deadline"), "No answer came in time: a firewall, or a server that hangs."),
    (
        ("disconnected", "reset", "closed"),
        "Somebody took the call and hung up: is it a PEMA server, of this transport, with TLS as you say?",
    ),
)
_GATEWAY_ERRORS: dict[int, type[PemaError]] = {
    401: Unauthenticated,
    403: Forbidden,
    408: RequestTimeout,
    413: PayloadTooLarge,
    429: Overloaded,
    502: GatewayFailed,
    503: NotReady,
    504: GatewayTimeout,
    # Of content delivery networks and load balancers, as Cloudflare numbers them.
    **dict.fromkeys((520, 521, 522, 523, 525, 526, 527, 529, 530), GatewayFailed),
    524: GatewayTimeout,
    598: GatewayTimeout,
    599: GatewayTimeout,
}
_REDIRECTS = (301, 302, 303, 307, 308)
_PROXY_STATUS = re.compile(r"\A(\d{3})\b|HTTP proxy returned response code (\d{3})")


@dataclass(frozen=True)
class Route:
    """The way to a server.

    Attributes:
        address: address of the server.
        proxy: proxy that leads there; None for none.
        roots: trusted root certificates; None if nothing is encrypted.
    """

    address: ServerAddress
    proxy: Proxy | None
    roots: TrustedRoots | None

    @classmethod
    def find(cls, url: str, settings: ConnectionSettings) -> Self:
        """The way to the server at `url` by settings and environment.

        Raises:
            InvalidRequest: the URL, a proxy or a file of certificates is not usable, or the key would travel in the
                clear.
        """
        address = ServerAddress.parse(url)
        if settings.api_key and not (address.is_encrypted or address.is_local or settings.insecure):
            raise InvalidRequest(
                f"The key would travel to {address.url} in the clear, where everybody on the way can read it.",
                hint="Use https:// or grpcs://. If the network is yours alone, say --insecure.",
            )
        proxy = proxy_for(address)
        encrypted = address.is_encrypted or (proxy is not None and proxy.scheme == "https")
        return cls(address, proxy, trusted_roots(settings.ca) if encrypted else None)

    def no_answer(
        self, cause: BaseException, name: str, request_id: str, kind: type[ConnectionFailed] = ConnectionFailed
    ) -> ConnectionFailed:
        """The error for a call without an answer.

        Args:
            cause: what the library says.
            name: its short name.
            request_id: id of the request.
            kind: class of the error.
        """
        text = str(cause).lower()
        reason = next((words for signs, words in _REASONS if any(sign in text for sign in signs)), "")
        through = "" if self.proxy is None else f" through the {self.proxy}"
        hint = self._hint(slow=issubclass(kind, TimedOut))
        if reason == _OTHER_TRANSPORT:
            hint = f"Use {_OTHER_SCHEMES[self.address.scheme]}://{self.address.authority}, or the other port."
        return kind(
            f"No answer from {self.address.url}{through} ({name}). {reason}".rstrip(), hint=hint, request_id=request_id
        )

    @property
    def path_hint(self) -> str:
        """A hint for an address whose path is none of the server's, such as the /v1 of other servers' addresses."""
        return f"Is the path of the address right? Without it: {replace(self.address, path='').url}"

    def _hint(self, *, slow: bool) -> str:
        if self.proxy is not None:
            return (
                f"Is the proxy right, and may it reach the server? Without a proxy: NO_PROXY={self.address.host}, "
                f"or unset {self.proxy.source}."
            )
        if slow:
            return "The server is too slow or hangs; ask its owner."
        hint = "Is the address right and the server running? It starts with: pema-server serve"
        if self.address.is_encrypted:
            # The server closes the connection silently if the client has no certificate, or one of another CA.
            hint += ". If the owner asks for a certificate of yours, say --client-certificate and --client-key."
        return hint

    def untrusted(self, reason: str, request_id: str) -> Untrusted:
        """The error for a server, or a proxy that decrypts, whose certificate does not prove its address."""
        source = "nothing" if self.roots is None else self.roots.source
        return Untrusted(
            f"The certificate of {self.address.url} cannot be trusted: {reason}. Trusted: {source}.",
            hint="If the server's owner, or your own network, has a CA of its own, say --ca FILE.",
            request_id=request_id,
        )

    def malformed(self, request_id: str, path: str = "") -> ProtocolViolation:
        """The error for an answer that cannot be read."""
        return ProtocolViolation(
            f"{self.address.url}{path} did not answer in the form of this protocol.",
            hint="Is this a PEMA server of the same version, or a proxy in front of it?",
            request_id=request_id,
        )

    def gateway_error(
        self, status: int, request_id: str, *, retry_after_s: float | None = None, location: str = "", path: str = ""
    ) -> PemaError:
        """The error for an HTTP status that does not come from the server, but from something in front of it.

        Args:
            status: the status.
            request_id: id of the request.
            retry_after_s: seconds after which the call may be repeated; None if unknown.
            location: where a redirect leads.
            path: path of the call below the server's address.
        """
        if status in _REDIRECTS:
            return self._redirect(status, request_id, location, path)
        # The status of a plain http:// call through a proxy may come from the proxy.
        if status == 407 and (error := self.proxy_error(str(status), request_id)) is not None:
            return error
        kind = _GATEWAY_ERRORS.get(status, InvalidRequest if status < 500 else ServerFault)
        hint = "Try again later, or ask the server's owner."
        if kind in (Unauthenticated, Forbidden, InvalidRequest):
            hint = "Is the address right, its path, too? Otherwise ask the server's owner."
        # Only what is not encrypted can be answered by a proxy.
        plain = self.proxy is not None and not self.address.is_encrypted
        suspect = f" It may be the {self.proxy}." if plain else ""
        return kind(
            f"Something in front of the server {self.address.url} answered HTTP {status}.{suspect}",
            hint=hint,
            retry_after_s=retry_after_s,
            request_id=request_id,
        )

    def _redirect(self, status: int, request_id: str, location: str, path: str) -> InvalidRequest:
        """A redirect is not followed: the key would go to another address than the one that the user chose."""
        call = path.partition("?")[0]
        base, matched, _ = location.rpartition(call) if call else (location, "", "")
        if "://" not in location:
            hint = "Ask the owner for the address of the server itself."
        elif matched:
            hint = f"If you trust that address, use it: --server {base}"
        else:
            hint = "This may be the page of a login; ask the owner for the address of the server itself."
        where = f" to {location}" if location else ""
        return InvalidRequest(
            f"{self.address.url} redirects{where} (HTTP {status}), which is not followed.",
            hint=hint,
            request_id=request_id,
        )

    def proxy_error(self, message: str, request_id: str) -> PemaError | None:
        """The error for a proxy that refuses to connect to the server; None if `message` says something else.

        Args:
            message: what the library says.
            request_id: id of the request.
        """
        match = _PROXY_STATUS.search(message)
        if self.proxy is None or match is None:
            return None
        status = int(match[1] or match[2])
        kind = _GATEWAY_ERRORS.get(status, InvalidRequest) if status >= 500 else InvalidRequest
        hint = f"Ask who runs it, or do without: NO_PROXY={self.address.host}."
        if status == 407:
            hint = f"It wants a user name and password: set {self.proxy.source} to http://user:password@host:port."
        return kind(
            f"No way to {self.address.url}: the {self.proxy} answers HTTP {status}.", hint=hint, request_id=request_id
        )

"""All servers of the suite as strangers may reach them, with `pytest --guarded`: TLS, keys, candidate rows, rotation.

Without it they are as on an owner's own machine: no TLS, no keys, the whole head in the model's own basis. Tests make
their servers with `support` and `processes` and their clients with the functions here, and are the same in both.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import grpc
import httpx
import trustme

from data_owner_client.plm.connection.base import Connection
from data_owner_client.plm.connection.open import open_connection
from data_owner_client.plm.remote_plm import RemotePlm
from plm_owner_server.admission.authentication import Authenticator, TenantKeyAuthenticator
from plm_owner_server.service.disclosure import Disclosure
from plm_owner_server.service.requests import CallContext
from plm_owner_server.tenants.quotas import Quotas
from plm_owner_server.tenants.store import TenantStore
from plm_owner_server.transports.tls import Certificate

TENANT = "acme"
DISCLOSURE = Disclosure("candidate", rotated=True)
# Counted, and never reached.
QUOTAS = Quotas(10**12, 10**12, 10**4, 10**6, 10**6)


class Authority:
    """Signs certificates for this machine, into the files that the server reads."""

    def __init__(self, folder: Path, name: str) -> None:
        self._authority = trustme.CA(organization_name=name)
        self.file = folder / f"{name}.pem"
        self._authority.cert_pem.write_to_path(str(self.file))

    def sign(self, certificate: Certificate, *names: str, common_name: str | None = None) -> None:
        signed = self._authority.issue_cert(*(names or ("127.0.0.1", "localhost")), common_name=common_name)
        signed.private_key_pem.write_to_path(str(certificate.key))
        certificate.chain.write_bytes(b"".join(blob.bytes() for blob in signed.cert_chain_pems))


@dataclass(frozen=True)
class Guard:
    """The guard before a server, and the credentials of its one tenant.

    Attributes:
        certificate: of the server.
        ca: the authority that signed it.
        store: URL of the database with the tenant.
        key: of the tenant's.
    """

    certificate: Certificate
    ca: Path
    store: str
    key: str

    @classmethod
    def new(cls, folder: Path) -> Self:
        """A new one, with its files in a folder."""
        certificate = Certificate(folder / "server.pem", folder / "server.key")
        authority = Authority(folder, "authority")
        authority.sign(certificate)
        store = f"sqlite:///{folder}/owner.db"
        key = TenantStore(store).add(TENANT, disclosure=DISCLOSURE, quotas=QUOTAS)
        return cls(certificate, authority.file, store, str(key))

    @property
    def flags(self) -> list[str]:
        """Flags of `pema-server serve`."""
        tls = ["--tls-certificate", str(self.certificate.chain), "--tls-key", str(self.certificate.key)]
        return ["--store", self.store, *tls]

    @property
    def client_environment(self) -> dict[str, str]:
        """Flags of `pema-client`."""
        return {"PEMA_CA": str(self.ca), "PEMA_API_KEY": self.key}

    @property
    def credentials(self) -> dict[str, Any]:
        """Keyword arguments of `connect` and `open_connection`."""
        return {"ca": self.ca, "api_key": self.key}

    @cached_property
    def access(self) -> Authenticator:
        """For servers in this process."""
        return TenantKeyAuthenticator(TenantStore(self.store))


current: Guard | None = None
"""The one before all servers that tests make."""


@contextmanager
def put_up(folder: Path) -> Iterator[None]:
    """Have all servers guarded that are made, and reached, from now on."""
    global current
    before, current = current, Guard.new(folder)
    try:
        yield
    finally:
        current = before


def url(scheme: str, port: int) -> str:
    """The address of a server on this machine; the scheme is `http` or `grpc`."""
    return f"{scheme}{'s' if current else ''}://127.0.0.1:{port}"


def access() -> Authenticator | None:
    """The authenticator of a server in this process that has no tenants of its own."""
    return current.access if current else None


def one_tenant(folder: Path) -> tuple[Authenticator, str]:
    """An authenticator with a tenant of its own, without quotas, and that tenant's key."""
    store = TenantStore(f"sqlite:///{folder}/owner.db")
    key = store.add("keyed")
    return TenantKeyAuthenticator(store), str(key)


def caller() -> CallContext:
    """The context of direct calls of the service, so that it discloses the same as to clients."""
    return CallContext(TENANT, TENANT, DISCLOSURE) if current else CallContext()


def credentials(**chosen: Any) -> dict[str, Any]:
    """Arguments of a client, those that it needs to pass among them, unless others are chosen."""
    return (current.credentials if current else {}) | chosen


def headers(**more: str) -> dict[str, str]:
    """Headers of an HTTP request."""
    return ({"Authorization": f"Bearer {current.key}"} if current else {}) | more


def trust() -> ssl.SSLContext | bool:
    """Whom an HTTP client trusts."""
    return ssl.create_default_context(cafile=current.ca) if current else True


def connection(address: str, **settings: Any) -> Connection:
    """Our own client's connection to a server."""
    return open_connection(address, **credentials(**settings))


@contextmanager
def remote_plm(address: str) -> Iterator[RemotePlm]:
    """The PLM of a server, with float32 on the wire and no cache on disk."""
    with closing(connection(address)) as opened:
        yield RemotePlm(opened, dtype="float32", cache=None)


def http(address: str, *, headers_of_all: dict[str, str] | None = None, timeout: float = 60) -> httpx.Client:
    """Somebody else's HTTP client, with the tenant's key unless other headers are given."""
    given = headers() if headers_of_all is None else headers_of_all
    return httpx.Client(base_url=address, headers=given, verify=trust(), timeout=timeout)


def channel(
    address: str,
    options: Sequence[tuple[str, Any]] = (),
    compression: grpc.Compression | None = None,
    *,
    with_key: bool = True,
) -> grpc.Channel:
    """Somebody else's gRPC client, with the tenant's key unless calls bring one of their own."""
    target = address.partition("://")[2]
    if current is None:
        return grpc.insecure_channel(target, options, compression)
    shown = grpc.ssl_channel_credentials(current.ca.read_bytes())
    if with_key:
        shown = grpc.composite_channel_credentials(shown, grpc.access_token_call_credentials(current.key))
    return grpc.secure_channel(target, shown, options, compression)


def encrypted(connected: socket.socket) -> socket.socket:
    """A connection on which a test speaks by hand; closed as soon as this one is."""
    if current is None:
        return connected
    return ssl.create_default_context(cafile=current.ca).wrap_socket(connected, server_hostname="127.0.0.1")

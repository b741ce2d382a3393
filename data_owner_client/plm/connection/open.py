"""Ways to reach a PLM server. Each translates between messages and a transport, and decides nothing else."""

from __future__ import annotations

import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from data_owner_client.plm.connection.base import Connection
from data_owner_client.plm.connection.grpc import GrpcConnection
from data_owner_client.plm.connection.rest import RestConnection
from data_owner_client.plm.connection.retries import RETRY_FOR_SECONDS
from protocol.addresses import is_loopback
from protocol.errors import InvalidRequest


def open_connection(
    url: str,
    *,
    api_key: str | None = None,
    insecure: bool = False,
    ca: Path | None = None,
    client_certificate: Path | None = None,
    client_key: Path | None = None,
    timeout_s: float = 600.0,
    give_up_after_s: float = RETRY_FOR_SECONDS,
) -> Connection:
    """A connection to the server at `url`; its scheme chooses the transport.

    Args:
        url: http://, https://, grpc:// or grpcs://.
        api_key: sent with every call, where the owner asks for one.
        insecure: send the key even where others may read it on the way.
        ca: PEM file of the authority that signed the server's certificate; one of those that all know unless given.
        client_certificate: PEM file of our own, where the owner asks for one.
        client_key: PEM file of its private key, without a password.
        timeout_s: longest wait for one answer, in seconds; a large batch on a CPU takes a while.
        give_up_after_s: how long a call that fails on the way is made again, in seconds.

    Raises:
        InvalidRequest: the URL is none, its scheme is not known, the key would travel in the clear, or there is no such
            authority or certificate.
    """
    scheme, _, rest = url.partition("://")
    if api_key and not (api_key.isascii() and api_key.isprintable()):
        raise InvalidRequest("The key has characters that no header can carry.", hint="Copy it again.")
    if api_key and scheme in ("http", "grpc") and not insecure and not is_loopback(url):
        raise InvalidRequest(
            f"The key would travel to {url} in the clear, for everybody on the way to read.",
            hint="Use https:// or grpcs://. If the network is yours alone, say --insecure.",
        )
    if ca is not None:
        _require_certificate(ca)
    if client_certificate is not None or client_key is not None:
        _require_own_certificate(client_certificate, client_key)
    settings: dict[str, Any] = {
        "api_key": api_key,
        "ca": ca,
        "client_certificate": client_certificate,
        "client_key": client_key,
        "timeout_s": timeout_s,
        "give_up_after_s": give_up_after_s,
    }
    if scheme in ("http", "https"):
        with suppress(httpx.InvalidURL):
            return RestConnection(url, **settings)
    if scheme in ("grpc", "grpcs") and rest:
        return GrpcConnection(url.rstrip("/"), **settings)
    raise InvalidRequest(
        f"{url!r} is no address of a PLM server.",
        hint="Give one like http://127.0.0.1:8000, grpc://127.0.0.1:8001 or https://plm.example.com.",
    )


def _require_certificate(path: Path) -> None:
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:  # SSLError is one, too
        raise InvalidRequest(
            f"{path} holds no certificate: {error}.", hint="--ca takes the PEM file of the authority."
        ) from error


def _require_own_certificate(certificate: Path | None, key: Path | None) -> None:
    hint = "--client-certificate and --client-key take PEM files, and go together; the key without a password."
    if certificate is None or key is None:
        raise InvalidRequest("A certificate and its key are wanted, and only one of them was given.", hint=hint)
    try:
        ssl.create_default_context().load_cert_chain(certificate, key, password="")
    except OSError as error:
        raise InvalidRequest(f"{certificate} and {key} are no certificate and its key: {error}.", hint=hint) from error

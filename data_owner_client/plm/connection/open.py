"""Opening of connections: the scheme of the URL chooses the transport."""

from __future__ import annotations

import ssl
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from data_owner_client.plm.connection.base import Connection
from data_owner_client.plm.connection.grpc import GrpcConnection
from data_owner_client.plm.connection.rest import RestConnection
from data_owner_client.plm.connection.settings import DEFAULT_CONNECTION, ConnectionSettings
from protocol.addresses import is_loopback
from protocol.errors import InvalidRequest


def open_connection(url: str, settings: ConnectionSettings = DEFAULT_CONNECTION, **fields: Any) -> Connection:
    """Return a connection to the server at `url`; its scheme chooses the transport.

    Args:
        url: http://, https://, grpc:// or grpcs://.
        settings: key, certificates, time-out and retries.
        fields: fields of `ConnectionSettings` that replace those of `settings`, for example `api_key`.

    Raises:
        InvalidRequest: the URL is not one, its scheme is unknown, the key would travel in the clear, there is no such
            CA or certificate, or a number is out of its bounds.
    """
    settings = replace(settings, **fields)
    scheme, _, rest = url.partition("://")
    key = settings.api_key
    if key and not (key.isascii() and key.isprintable()):
        raise InvalidRequest("The key has characters that no header can carry.", hint="Copy it again.")
    if key and scheme in ("http", "grpc") and not settings.insecure and not is_loopback(url):
        raise InvalidRequest(
            f"The key would travel to {url} in the clear, where everybody on the way can read it.",
            hint="Use https:// or grpcs://. If the network is yours alone, say --insecure.",
        )
    if settings.ca is not None:
        _require_certificate(settings.ca)
    if settings.client_certificate is not None or settings.client_key is not None:
        _require_client_certificate(settings.client_certificate, settings.client_key)
    if scheme in ("http", "https"):
        with suppress(httpx.InvalidURL):
            return RestConnection(url, settings)
    if scheme in ("grpc", "grpcs") and rest:
        return GrpcConnection(url.rstrip("/"), settings)
    raise InvalidRequest(
        f"{url!r} is not the address of a PLM server.",
        hint="Give one like http://127.0.0.1:8000, grpc://127.0.0.1:8001 or https://plm.example.com.",
    )


def _require_certificate(path: Path) -> None:
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:  # SSLError is one, too
        raise InvalidRequest(
            f"{path} holds no certificate: {error}.", hint="--ca takes the PEM file of the CA."
        ) from error


def _require_client_certificate(certificate: Path | None, key: Path | None) -> None:
    hint = "--client-certificate and --client-key take PEM files, and go together; the key without a password."
    if certificate is None or key is None:
        raise InvalidRequest("A client certificate needs its key: only one of them was set.", hint=hint)
    try:
        ssl.create_default_context().load_cert_chain(certificate, key, password="")
    except OSError as error:
        raise InvalidRequest(f"{certificate} and {key} are no certificate and its key: {error}.", hint=hint) from error

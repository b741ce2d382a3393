"""Opening of connections: the scheme of the URL chooses the transport."""

from __future__ import annotations

import ssl
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_owner_client.plm.connection.base import Connection
from data_owner_client.plm.connection.grpc import GrpcConnection
from data_owner_client.plm.connection.network.address import ServerAddress
from data_owner_client.plm.connection.rest import RestConnection
from data_owner_client.plm.connection.settings import DEFAULT_CONNECTION, ConnectionSettings
from protocol.errors import InvalidRequest


def open_connection(url: str, settings: ConnectionSettings = DEFAULT_CONNECTION, **fields: Any) -> Connection:
    """Return a connection to the server at `url`; its scheme chooses the transport.

    Args:
        url: http://, https://, grpc:// or grpcs://.
        settings: key, certificates, time-out and retries.
        fields: fields of `ConnectionSettings` that replace those of `settings`, for example `api_key`.

    Raises:
        InvalidRequest: the URL is not one, its scheme is unknown, the key would travel in the clear, there is no such
            CA or certificate, the proxy of the environment cannot be used, or a number is out of its bounds.
    """
    settings = replace(settings, **fields)
    if settings.client_certificate is not None or settings.client_key is not None:
        _require_client_certificate(settings.client_certificate, settings.client_key)
    connection = GrpcConnection if ServerAddress.parse(url).is_grpc else RestConnection
    return connection(url, settings)


def _require_client_certificate(certificate: Path | None, key: Path | None) -> None:
    hint = "--client-certificate and --client-key take PEM files, and go together; the key without a password."
    if certificate is None or key is None:
        raise InvalidRequest("A client certificate needs its key: only one of them was set.", hint=hint)
    try:
        ssl.create_default_context().load_cert_chain(certificate, key, password="")
    except OSError as error:
        raise InvalidRequest(f"{certificate} and {key} are no certificate and its key: {error}.", hint=hint) from error

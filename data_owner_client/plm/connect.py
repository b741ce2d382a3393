"""Connect to a PLM owner's server."""

from __future__ import annotations

from typing import Any

from data_owner_client.plm.connection.open import open_connection
from data_owner_client.plm.connection.settings import DEFAULT_CONNECTION, ConnectionSettings
from data_owner_client.plm.remote_plm import RemotePlm
from protocol.errors import PemaError
from protocol.types import WireDtype


def connect(
    url: str,
    settings: ConnectionSettings = DEFAULT_CONNECTION,
    *,
    dtype: WireDtype = "float16",
    **fields: Any,
) -> RemotePlm:
    """Connect to the PLM behind a server: `connect("https://plm.example.com", api_key="…")`.

    Args:
        url: http://, https://, grpc:// or grpcs://.
        settings: key, certificates, time-out and retries.
        dtype: number format of representations on the wire.
        fields: fields of `ConnectionSettings` that replace those of `settings`, for example `api_key`.

    Raises:
        ConnectionFailed: there is no answer at this address.
        Untrusted: the server cannot prove its identity.
        Unauthenticated: the owner requires a key, or a certificate.
        Forbidden: the key does not allow to see the model card.
        InvalidRequest: the URL is not one, `ca` holds no certificate, the key would travel in the clear, a number is
            out of its bounds, or the number format is unknown.
    """
    connection = open_connection(url, settings, **fields)
    try:
        return RemotePlm(connection, dtype=dtype)
    except PemaError:
        connection.close()
        raise

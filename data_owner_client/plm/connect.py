"""Connect to a PLM owner's server."""

from __future__ import annotations

from pathlib import Path

from data_owner_client.plm.connection.open import open_connection
from data_owner_client.plm.connection.retries import RETRY_FOR_SECONDS
from data_owner_client.plm.remote_plm import RemotePlm
from protocol.errors import PemaError
from protocol.types import WireDtype


def connect(
    url: str,
    *,
    dtype: WireDtype = "float16",
    api_key: str | None = None,
    insecure: bool = False,
    ca: Path | None = None,
    client_certificate: Path | None = None,
    client_key: Path | None = None,
    timeout_s: float = 600.0,
    give_up_after_s: float = RETRY_FOR_SECONDS,
) -> RemotePlm:
    """The PLM behind a server. The arguments: see `connection.open_connection` and `RemotePlm`.

    Raises:
        ConnectionFailed: nobody answers there.
        Untrusted: it cannot prove who it is.
        Unauthenticated: the owner asks for a key, or for a certificate.
        Forbidden: the key does not allow to see the model card.
        InvalidRequest: the URL is none, `ca` holds no certificate, or the key would travel in the clear.
    """
    connection = open_connection(
        url,
        api_key=api_key,
        insecure=insecure,
        ca=ca,
        client_certificate=client_certificate,
        client_key=client_key,
        timeout_s=timeout_s,
        give_up_after_s=give_up_after_s,
    )
    try:
        return RemotePlm(connection, dtype=dtype)
    except PemaError:
        connection.close()
        raise

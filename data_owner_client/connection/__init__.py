"""Ways to reach a PLM server. Each translates between messages and a transport, and decides nothing else."""

from contextlib import suppress

import httpx

from data_owner_client.connection.base import Connection
from data_owner_client.connection.grpc import GrpcConnection
from data_owner_client.connection.rest import RestConnection
from protocol.errors import InvalidRequest

__all__ = ["Connection", "GrpcConnection", "RestConnection", "open_connection"]


def open_connection(url: str, *, timeout_s: float = 600.0) -> Connection:
    """A connection to the server at `url`; its scheme chooses the transport.

    Raises:
        InvalidRequest: the URL is none, or its scheme is not known.
    """
    scheme, _, rest = url.partition("://")
    if scheme in ("http", "https"):
        with suppress(httpx.InvalidURL):
            return RestConnection(url, timeout_s=timeout_s)
    if scheme in ("grpc", "grpcs") and rest:
        return GrpcConnection(url.rstrip("/"), timeout_s=timeout_s)
    raise InvalidRequest(
        f"{url!r} is no address of a PLM server.",
        hint="Give one like http://127.0.0.1:8000, grpc://127.0.0.1:8001 or https://plm.example.com.",
    )

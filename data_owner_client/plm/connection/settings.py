"""Settings of the connection to a server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le, Unit
from cyclopts import Parameter

from data_owner_client.runtime.arguments import to_path
from data_owner_client.runtime.declared_settings import require_in_bounds
from protocol.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class ConnectionSettings:
    """Settings of the connection to a server.

    Attributes:
        api_key: Key that the owner gave you. Better set in the environment: everybody on the machine can see options.
        insecure: Send the key unencrypted, over http:// or grpc:// to another machine.
        ca: PEM file of the CA that signed the server's certificate, if it is not publicly trusted.
        client_certificate: PEM file of your own certificate, if the owner requires one.
        client_key: PEM file of the private key of your certificate, without a password.
        timeout: Longest wait for one answer, in seconds; a large batch on a CPU takes a while.
        retry_for: Seconds to retry a call when the server is gone or too busy, from the first failure on.
    """

    api_key: Annotated[str | None, Parameter(env_var="PEMA_API_KEY")] = field(default=None, repr=False)
    insecure: bool = False
    ca: Annotated[Path | None, Parameter(env_var="PEMA_CA")] = None
    client_certificate: Annotated[Path | None, Parameter(env_var="PEMA_CLIENT_CERTIFICATE")] = None
    client_key: Annotated[Path | None, Parameter(env_var="PEMA_CLIENT_KEY")] = None
    timeout: Annotated[float, Ge(0.1), Le(1_000_000), Unit("seconds")] = 600.0
    # Long enough for a server to be restarted with a large model, or to work off what it has.
    retry_for: Annotated[float, Ge(0), Unit("seconds")] = 300.0

    def __post_init__(self) -> None:
        require_in_bounds(self)
        # Editors and `$(cat file)` leave a newline behind a value, and compose files set what is missing to nothing.
        object.__setattr__(self, "api_key", (self.api_key or "").strip() or None)
        for name in ("ca", "client_certificate", "client_key"):
            path = to_path(str(getattr(self, name) or "").strip())
            object.__setattr__(self, name, None if path == Path() else path)
        key = self.api_key or ""
        # `docker --env-file` keeps the quotes around a value.
        in_quotes = len(key) > 1 and key[0] == key[-1] and key[0] in "\"'"
        if in_quotes or " " in key or not (key.isascii() and key.isprintable()):
            raise InvalidRequest(
                "The key in PEMA_API_KEY or --api-key has quotes, a space, or a character that no header can carry.",
                hint="Copy the key again, and nothing beside it.",
            )


DEFAULT_CONNECTION = ConnectionSettings()

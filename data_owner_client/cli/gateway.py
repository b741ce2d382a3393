"""`pema-client gateway`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from data_owner_client.cli.app import command, set_threads
from data_owner_client.cli.options import DATA, DEFAULT_SERVER, Connection, Dtype, Server, Threads
from data_owner_client.gateway.settings import DEFAULT_GATEWAY, GatewaySettings
from data_owner_client.plm.connection.settings import DEFAULT_CONNECTION
from data_owner_client.runtime.arguments import to_path
from protocol import standard_streams
from protocol.addresses import authority
from protocol.errors import InvalidData, Unsupported

if TYPE_CHECKING:
    from data_owner_client.gateway.state import Gateway

_GATEWAY = Group("Gateway", sort_key=2)
_ALL_INTERFACES = frozenset({"0.0.0.0", "::"})  # noqa: S104
_PUBLIC_PART = re.compile(r"pema_[0-9a-f]{16}_")
_EXTRA = frozenset({"fastapi", "prometheus_client", "starlette", "uvicorn"})


@command()
def gateway(
    *,
    adapter: Annotated[
        list[str] | None,
        Parameter(
            help="Adapter to serve, as NAME=FOLDER, or FOLDER under that folder's name; may be given several times. "
            "The PLM alone is served, too.",
            group=DATA,
        ),
    ] = None,
    settings: Annotated[GatewaySettings, Parameter(name="*", group=_GATEWAY)] = DEFAULT_GATEWAY,
    threads: Threads = 0,
    server: Server = DEFAULT_SERVER,
    connection: Connection = DEFAULT_CONNECTION,
    dtype: Dtype = "float16",
) -> None:
    """Serve adapted models to applications that speak OpenAI's protocol, and show who chose each token in a browser.

    Adapters stay on this machine. The owner of the PLM sees every prompt and every text that is scored, as with the
    other commands. At the start, --retry-for is the wait for the owner's server; later, --patience is.

    Examples:

    - `pema-client gateway --adapter adapter`
    - `pema-client gateway --adapter formal=runs/formal --adapter legal=runs/legal --server https://plm.example.com`
    - `PEMA_GATEWAY_KEY=$(openssl rand -hex 32) pema-client gateway --adapter adapter --host 0.0.0.0`
    - `pema-client gateway --allow-origin https://app.example --port 9000`
    """
    folders = adapter_folders(adapter or [])
    try:
        from data_owner_client.gateway.run import run_gateway
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        raise Unsupported(
            f"The gateway needs the package {error.name}.", hint="Run: pip install -e '.[client,gateway]'"
        ) from error
    set_threads(threads)
    server = server.strip() or DEFAULT_SERVER
    run_gateway(
        folders,
        replace(settings, host=settings.host.strip() or DEFAULT_GATEWAY.host),
        server,
        connection,
        dtype=dtype,
        announce=lambda gateway: standard_streams.say("\n".join(_announcement(gateway, server, connection.api_key))),
    )


def adapter_folders(values: Sequence[str]) -> dict[str, Path]:
    """The adapters' folders by the names under which they are served.

    Args:
        values: NAME=FOLDER or FOLDER.

    Raises:
        InvalidData: a name is missing or given twice.
    """
    folders: dict[str, Path] = {}
    for value in values:
        name, sign, rest = value.partition("=")
        if not sign or "/" in name:  # a path may have a `=`
            name, rest = to_path(value).resolve().name, value
        if not name.strip() or not rest.strip():
            raise InvalidData(f"--adapter has {value!r}.", hint="Give NAME=FOLDER, such as formal=runs/formal.")
        if name in folders:
            raise InvalidData(f"Two adapters have the name {name}.", hint="Give one another: --adapter NAME=FOLDER.")
        folders[name] = to_path(rest)
    return folders


def _announcement(gateway: Gateway, server: str, owner_key: str | None) -> list[str]:
    """Lines that say what is served, where, and what leaves this machine."""
    settings, plm = gateway.settings, gateway.plm.card.name
    address = authority("127.0.0.1" if settings.host in _ALL_INTERFACES else settings.host, settings.port)
    adapters = [model.name for model in gateway.models.all() if model.adapter is not None]
    key = "any key" if settings.gateway_key is None else "the key in PEMA_GATEWAY_KEY"
    known_as = "without a key" if owner_key is None else f"with the key {public_part(owner_key)}"
    return [
        f"Models: {', '.join([*adapters, f'{plm} (the PLM alone)'])}.",
        f"Applications: base URL http://{address}/v1, {key}.",
        f"Page: http://{address}/",
        f"The owner of the PLM at {server} sees every prompt and every text that is scored, {known_as}.",
    ]


def public_part(key: str) -> str:
    """The part of a tenant's key that names it. The secret behind it may have underscores, too."""
    found = _PUBLIC_PART.match(key)
    return f"{found[0]}…" if found else "that you gave"

"""Settings of the gateway."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from annotated_types import Ge, Le, Unit
from cyclopts import Parameter

from data_owner_client.runtime.declared_settings import require_in_bounds
from protocol.addresses import is_loopback
from protocol.errors import InvalidRequest

LogLevel = Literal["debug", "info", "warning", "error"]
_ORIGIN = re.compile(r"https?://[^/@?#\s*]+")
_HOST = re.compile(r"[^/@?#\s*]+")


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """Settings of the gateway.

    Attributes:
        host: Address to listen on. With any other than this machine's own, applications need a key.
        port: Port to listen on; 0 takes a free one.
        gateway_key: Key that applications must send; it is none of the owner's. Better set in the environment:
            everybody on the machine can see options.
        allowed_hosts: Further names by which applications may call the gateway, such as gateway or
            gateway.example:443; without a port, on the gateway's own. Several follow one --allowed-hosts.
        allow_origin: Web pages of other hosts that may call the gateway, such as https://app.example. Several follow
            one --allow-origin.
        max_waiting: Answers that may wait for a place in a round; further requests get status 429.
        batch_size: Answers in one call to the owner; one that ends makes room for the next.
        patience: Seconds for which an answer under way outlasts an owner that refuses calls or is away.
        max_body_bytes: Size of the largest request.
        full_head: Fetch the whole LM head at the start, so that tokens are drawn from the whole vocabulary. Without
            it, draws come from the adapter's candidates and the PLM's most probable token.
        log_level: Least severe lines in the log.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Ge(0), Le(65535)] = 8010
    gateway_key: Annotated[str | None, Parameter(env_var="PEMA_GATEWAY_KEY")] = field(default=None, repr=False)
    allowed_hosts: Annotated[tuple[str, ...], Parameter(consume_multiple=1, allow_leading_hyphen=False)] = ()
    allow_origin: Annotated[tuple[str, ...], Parameter(consume_multiple=1, allow_leading_hyphen=False)] = ()
    max_waiting: Annotated[int, Ge(1), Unit("answers")] = 256
    batch_size: Annotated[int, Ge(1), Unit("answers")] = 32
    patience: Annotated[float, Ge(0), Unit("seconds")] = 60.0
    max_body_bytes: Annotated[int, Ge(1024), Unit("bytes")] = 4 * 2**20
    full_head: bool = False
    log_level: LogLevel = "info"

    def __post_init__(self) -> None:
        require_in_bounds(self)
        # Editors and `$(cat file)` leave a newline behind a value, and compose files set what is missing to nothing.
        object.__setattr__(self, "gateway_key", (self.gateway_key or "").strip() or None)
        _require_key(self.host, self.gateway_key)
        for name, pattern, example in (
            ("allowed_hosts", _HOST, "gateway or gateway.example:443"),
            ("allow_origin", _ORIGIN, "https://app.example"),
        ):
            for value in getattr(self, name):
                if not pattern.fullmatch(value):
                    raise InvalidRequest(f"{name} has {value!r}.", hint=f"Give values such as {example}, without a *.")
        if self.log_level not in get_args(LogLevel):
            raise InvalidRequest(
                f"log_level is {self.log_level!r}.", hint=f"Use one of {', '.join(get_args(LogLevel))}."
            )


def _require_key(host: str, key: str | None) -> None:
    if key is None and not is_loopback(host):
        raise InvalidRequest(
            f"Everybody who reaches {host or 'this address'} could use the gateway, as it has no key.",
            hint="Set PEMA_GATEWAY_KEY (openssl rand -hex 32), or leave --host at 127.0.0.1.",
        )
    if key is not None and (" " in key or not (key.isascii() and key.isprintable())):
        raise InvalidRequest(
            "The key in PEMA_GATEWAY_KEY or --gateway-key has a space, or a character that no header can carry.",
            hint="Take letters and digits: openssl rand -hex 32.",
        )


DEFAULT_GATEWAY = GatewaySettings()

"""Values of the server's settings: their types, their words in `--help`, and the sources they are read from."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from protocol.addresses import ip_address

PREFIX = "PEMA_"
"""Beginning of the environment variable of every setting."""
_HOST_RULE = re.compile(r"\*|(\*\.)?[\w-]+(\.[\w-]+)*\.?(:\d+)?", re.ASCII)
# In a pod, Kubernetes sets PEMA_PORT to this for a Service named pema, and PEMA_GRPC_PORT for one named pema-grpc.
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://\S+")


@dataclass(frozen=True)
class Metavar:
    """The word for a flag's value in `--help`."""

    word: str


def _in_home(path: Path) -> Path:
    # Path.expanduser raises an error for unknown users; this leaves their names.
    return Path(os.path.expanduser(path))


def _is_host_rule(text: str) -> bool:
    """True if this is `*`, a host name, `*.` before one, or an IP address; a port does not count."""
    bare = re.sub(r"\A\[(.*)\](:\d+)?\Z", r"\1", text)
    return _HOST_RULE.fullmatch(text) is not None or ip_address(bare) is not None


def _listening_address(text: str) -> str:
    """An address to listen on, without the brackets of IPv6.

    Raises:
        ValueError: it is no name and no IP address.
    """
    bare = re.sub(r"\A\[(.*)\]\Z", r"\1", text)
    if ip_address(bare) is None and not re.fullmatch(r"[\w.-]+", bare):
        raise ValueError(f"{text!r} is no address; give an IP address or a name, without scheme, port and path")
    return bare


def _host_rules(value: Any) -> Any:
    """Rules for hosts, as a list or divided by commas or space.

    Raises:
        ValueError: one of them matches no host.
    """
    rules = tuple(filter(None, re.split(r"[,\s]+", value))) if isinstance(value, str) else value
    if wrong := next((rule for rule in rules if not _is_host_rule(rule)), None):
        raise ValueError(
            f"{wrong} is no host; give names as they stand in URLs, without scheme and path, such as "
            "gpu.example.com, *.example.com or xn--mller-kva.example"
        )
    return rules


Port = Annotated[int, Field(ge=0, le=65535), Metavar("PORT")]
Tokens = Annotated[int, Metavar("TOKENS")]
Bytes = Annotated[int, Metavar("BYTES")]
Number = Annotated[int, Metavar("N")]
Seconds = Annotated[float, Metavar("SECONDS")]
# Shells leave the `~` of `--tls-key=~/key` as it is, and so do service managers in variables.
File = Annotated[Path, AfterValidator(_in_home), Metavar("FILE")]
Folder = Annotated[Path, AfterValidator(_in_home), Metavar("FOLDER")]
Address = Annotated[str, AfterValidator(_listening_address), Metavar("ADDRESS")]
HostRules = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_host_rules), Metavar("HOST,...")]


def is_of_kubernetes(variable: str, value: str) -> bool:
    """True if an environment variable is the address of a Service, and not our setting of the same name."""
    return variable.upper().endswith("PORT") and _SERVICE_ADDRESS.fullmatch(value) is not None


class SettingsGroup(BaseSettings):
    """Settings from flags, the environment and `.env`, in this order of precedence."""

    # The title that a subclass adds is that of its flags in --help.
    model_config = SettingsConfigDict(env_prefix=PREFIX, env_file=".env", extra="ignore", protected_namespaces=())

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The sources of settings, without variables of Kubernetes, empty ones, and space around values.

        A value that is taken from a file, such as a mounted secret, often ends in a newline. Compose files set to
        nothing what the owner has not set (`PEMA_REVISION=${REVISION:-}`).
        """
        for source in (env_settings, dotenv_settings):
            if isinstance(source, EnvSettingsSource):
                source.env_vars = {
                    name: value.strip()
                    for name, value in source.env_vars.items()
                    if value and value.strip() and not is_of_kubernetes(name, value)
                }
        return init_settings, env_settings, dotenv_settings

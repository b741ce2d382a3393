"""Old names of flags, environment variables and subcommands. They work, with a warning, until version 0.3."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress

from dotenv import dotenv_values

from plm_owner_server.setting_values import PREFIX
from plm_owner_server.settings import StoreSettings
from protocol.errors import InvalidRequest

RENAMED_FLAGS = {
    "--transfer-s": "--transfer-timeout",
    "--drain-seconds": "--drain-timeout",
    "--prefix-cache-seconds": "--prefix-cache-ttl",
    "--batch-tokens": "--max-batch-tokens",
    "--padding-tokens": "--max-batch-padding",
    "--drafting-tokens": "--max-draft-tokens",
}
"""Flags of `serve`, old name to new name. Their environment variables were renamed with them."""
RENAMED_SUBCOMMANDS = {"disclose": "set-disclosure", "limit": "set-quotas"}
"""Subcommands of `tenants`, old name to new name."""
_SWITCH = "--pack-weights"  # was followed by yes or no
_SWITCH_WORDS = dict.fromkeys(("1", "on", "t", "true", "y", "yes"), True)
_SWITCH_WORDS |= dict.fromkeys(("0", "off", "f", "false", "n", "no"), False)


def with_current_names(arguments: Sequence[str]) -> list[str]:
    """Return the command line with old names replaced; replace those of the environment and of `.env` in place.

    Args:
        arguments: the command line without the program's name.

    Raises:
        InvalidRequest: a flag was removed.
    """
    command, *rest = arguments or [""]
    if command == "serve":
        _rename_variables()
        return [command, *map(_current_flag, _current_switches(rest))]
    if command == "tenants" and rest and rest[0] in RENAMED_SUBCOMMANDS:
        new = RENAMED_SUBCOMMANDS[rest[0]]
        _warn(f"tenants {rest[0]}", f"tenants {new}")
        return [command, new, *rest[1:]]
    return list(arguments)


def _current_switches(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments, with `--pack-weights false` replaced by `--no-pack-weights`."""
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        flag, equals, value = argument.partition("=")
        word = value if equals else next(iter(remaining), "")
        if flag != _SWITCH or word.lower() not in _SWITCH_WORDS:
            yield argument
            continue
        if not equals:
            del remaining[0]
        current = _SWITCH if _SWITCH_WORDS[word.lower()] else _SWITCH.replace("--", "--no-", 1)
        _warn(f"{_SWITCH} {word}", current)
        yield current


def _current_flag(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    if flag == "--api-key":
        raise InvalidRequest(
            "--api-key was removed: every client has a key of its own.",
            hint="Create a tenant with pema-server tenants add NAME.",
        )
    if flag not in RENAMED_FLAGS:
        return argument
    _warn(flag, RENAMED_FLAGS[flag])
    return f"{RENAMED_FLAGS[flag]}{equals}{value}"


def _rename_variables() -> None:
    """Copy the values of old environment variables to the new ones, which win if both are set."""
    values: dict[str, str] = {}
    with suppress(OSError, UnicodeDecodeError):  # reported where the settings are read
        file = str(StoreSettings.model_config["env_file"])
        values = {name.upper(): value for name, value in dotenv_values(file).items() if value is not None}
    values |= {name.upper(): value for name, value in os.environ.items()}
    for old, new in ((variable_of(old), variable_of(new)) for old, new in RENAMED_FLAGS.items()):
        if old in values:
            _warn(old, new)
            if new not in values:
                os.environ[new] = values[old]


def variable_of(flag: str) -> str:
    """The environment variable of a flag of `serve`."""
    return f"{PREFIX}{flag.removeprefix('--').replace('-', '_').upper()}"


def _warn(old: str, new: str) -> None:
    print(f"pema-server: {old} is now {new}; the old name works until version 0.3.", file=sys.stderr)

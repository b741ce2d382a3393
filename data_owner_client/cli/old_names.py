"""Old names of flags. They work, with a warning, until version 0.3."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyclopts import CycloptsError

from data_owner_client.training.settings import OLD_PAIRINGS

RENAMED_FLAGS = {
    "--averaging": "--ema-decay",
    "--decoded": "--selection-texts",
    "--distributions": "--head-contexts",
    "--give-up-after": "--retry-for",
    "--known-only": "--candidates-only",
    "--nearest": "--retrieved-examples",
    "--search-minutes": "--minutes",
}
"""Flags, old name to new name."""
RENAMED_VALUES: dict[str, dict[str, str]] = {"--pairing": {**OLD_PAIRINGS}}
"""Values of flags, old name to new name."""
REMOVED_FLAGS = {
    "--label-smoothing": "it made adapters worse",
    "--own-axes": "it made adapters worse in a secret basis",
    "--principal-axes": "training always uses the principal axes",
}
"""Flags that are gone, and why; the CHANGELOG has the figures."""


def with_current_names(arguments: Sequence[str]) -> list[str]:
    """Return the command line with old names replaced.

    Args:
        arguments: the command line without the program's name.

    Raises:
        CycloptsError: a flag was removed.
    """
    current: list[str] = []
    for position, argument in enumerate(arguments):
        if argument == "--":
            return [*current, *arguments[position:]]
        current.append(_current(argument, current[-1] if current else ""))
    return current


def _current(argument: str, before: str) -> str:
    if argument in RENAMED_VALUES.get(before, ()):
        return _renamed(before, argument)
    flag, equals, value = argument.partition("=")
    if flag in REMOVED_FLAGS:
        raise CycloptsError(msg=f"{flag} was removed: {REMOVED_FLAGS[flag]}, as the CHANGELOG shows.")
    if flag in RENAMED_FLAGS:
        _warn(flag, RENAMED_FLAGS[flag])
        flag = RENAMED_FLAGS[flag]
    if equals and value in RENAMED_VALUES.get(flag, ()):
        value = _renamed(flag, value)
    return f"{flag}{equals}{value}"


def _renamed(flag: str, value: str) -> str:
    new = RENAMED_VALUES[flag][value]
    _warn(f"{flag} {value}", f"{flag} {new}")
    return new


def _warn(old: str, new: str) -> None:
    print(f"pema-client: {old} is now {new}; the old name works until version 0.3.", file=sys.stderr)

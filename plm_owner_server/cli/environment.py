"""Warnings about environment variables that look like settings of the server, and do not work as such."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from difflib import get_close_matches

from plm_owner_server.cli.old_names import RENAMED_FLAGS, variable_of
from plm_owner_server.setting_values import PREFIX, is_of_kubernetes
from plm_owner_server.settings import ServerSettings

# Smallest similarity of a misspelt name to the right one.
_SIMILARITY = 0.85
_QUOTED = re.compile(r"""(["']).*\1""", re.DOTALL)
# Of the client, and of docker-compose.yml.
_OTHERS = frozenset({"PEMA_SERVER", "PEMA_API_KEY", "PEMA_MODELS"})


def warn_of_variables() -> None:
    """Warn of variables that Kubernetes has set, of values in quotes, and of misspelt names."""
    for line in variable_warnings(os.environ):
        print(f"pema-server: {line}", file=sys.stderr)


def variable_warnings(environment: Mapping[str, str]) -> Iterator[str]:
    """A line for each variable that has no effect, or another one than its owner thinks."""
    settings = {f"{PREFIX}{name}".upper() for name in ServerSettings.model_fields}
    known = settings | _OTHERS | {variable_of(flag) for flag in RENAMED_FLAGS}
    for name, value in environment.items():
        if name.upper() in settings and is_of_kubernetes(name, value):
            flag = name.upper().removeprefix(PREFIX).replace("_", "-").lower()
            yield (
                f"{name}={value} is the address of a Service of Kubernetes, and is ignored. Say --{flag} to choose a "
                "port, or set enableServiceLinks: false in the pod."
            )
        elif name.upper() in settings and _QUOTED.fullmatch(value.strip()):
            yield f"the quotes around the value of {name} are a part of it (docker --env-file keeps them); remove them."
        elif name.startswith(PREFIX) and name not in known:
            for similar in get_close_matches(name, settings, n=1, cutoff=_SIMILARITY):
                yield f"{name} is no setting, and is ignored; did you mean {similar}?"

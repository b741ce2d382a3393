"""A stand-in for the package of command lines, where a machine lacks it.

A machine with a GPU has torch and transformers, and few of this project's other packages. The client's settings hold
notes for its command line, which nothing reads here. This module is a plugin of pytest, too (`-p`).
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType


class _Parameter:
    """`cyclopts.Parameter`: notes about an option of a command line."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...


def provide() -> None:
    """Offer the stand-in if the package is missing."""
    if find_spec("cyclopts") is None:
        module = ModuleType("cyclopts")
        vars(module)["Parameter"] = _Parameter
        sys.modules["cyclopts"] = module


provide()

"""Loading of the engine that the owner chose."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from plm_owner_server.engines.interface import Engine
from plm_owner_server.settings import ENGINES, ServerSettings


def load_engine(folder: Path, settings: ServerSettings) -> Engine:
    """Load a model and warm its engine up.

    Raises:
        InvalidRequest: the engine is not installed.
        Unsupported: the engine cannot serve this model.
    """
    load: Callable[[Path, ServerSettings], Engine] = import_module(ENGINES[settings.engine].module).load
    engine = load(folder, settings)
    engine.warm_up()
    return engine

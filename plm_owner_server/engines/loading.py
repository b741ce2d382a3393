"""Loading of the engine that the owner chose."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

from plm_owner_server.engines.decoding_check import check_decoding
from plm_owner_server.engines.interface import Engine
from plm_owner_server.engines.model_files.config import ATTENTION_HINT, architecture
from plm_owner_server.engines.model_files.weights import check_folder
from plm_owner_server.settings import ENGINES, ServerSettings
from protocol.errors import PemaError, Unsupported


def load_engine(folder: Path, settings: ServerSettings) -> Engine:
    """Load a model and warm its engine up.

    Raises:
        InvalidRequest: the engine is not installed.
        Unsupported: the engine cannot serve this model.
    """
    check_folder(folder)
    load: Callable[[Path, ServerSettings], Engine] = import_module(ENGINES[settings.engine].module).load
    engine = load(folder, settings)
    try:
        engine.warm_up()
        check_decoding(engine)
        engine.reset()
    except (PemaError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise Unsupported(
            f"{architecture(folder)} cannot be run by --engine {settings.engine}: {type(error).__name__}: {error}.",
            hint=ATTENTION_HINT,
        ) from error
    return engine

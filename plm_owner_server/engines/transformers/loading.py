"""Loading of the transformers engine from the server's settings."""

from __future__ import annotations

import logging
from pathlib import Path

from plm_owner_server.engines.transformers.engine import TransformersEngine, load_model
from plm_owner_server.settings import ServerSettings

log = logging.getLogger(__name__)


def load(folder: Path, settings: ServerSettings) -> TransformersEngine:
    """Load a model from its folder.

    Raises:
        Unsupported: the engine cannot serve this model.
    """
    model = load_model(folder, device=settings.device, dtype=settings.dtype, device_map=settings.device_map)
    log.info("transformers runs the model on %s", model.device)
    return TransformersEngine(
        model,
        cr_kind=settings.cr_kind,
        prefix_cache_bytes=settings.prefix_cache_bytes,
        prefix_cache_ttl=settings.prefix_cache_ttl,
        pack_weights=settings.pack_weights,
    )

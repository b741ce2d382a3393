"""Loading of the engine that the owner chose."""

from __future__ import annotations

import logging
from pathlib import Path

from plm_owner_server.engines.interface import Engine
from plm_owner_server.engines.transformers.engine import TransformersEngine, load_model
from plm_owner_server.settings import ServerSettings

log = logging.getLogger(__name__)


def load_engine(folder: Path, settings: ServerSettings) -> Engine:
    """Load a model and warm its engine up.

    Raises:
        InvalidRequest: the engine is not installed.
        Unsupported: the engine cannot serve this model.
    """
    engine = _vllm(folder, settings) if settings.engine == "vllm" else _transformers(folder, settings)
    engine.warm_up()
    return engine


def _transformers(folder: Path, settings: ServerSettings) -> Engine:
    model = load_model(folder, device=settings.device, dtype=settings.dtype, device_map=settings.device_map)
    log.info("transformers runs the model on %s", model.device)
    return TransformersEngine(
        model,
        cr_kind=settings.cr_kind,
        prefix_cache_bytes=_prefix_cache_bytes(settings),
        prefix_cache_ttl=settings.prefix_cache_ttl,
        pack_weights=settings.pack_weights,
    )


def _vllm(folder: Path, settings: ServerSettings) -> Engine:
    from plm_owner_server.engines.vllm.async_llm import VllmSettings, load_vllm_engine

    return load_vllm_engine(
        folder,
        VllmSettings(
            dtype=settings.dtype,
            device=settings.device,
            threads=settings.threads,
            max_tokens=settings.max_sequence_tokens,
            batch_tokens=settings.max_batch_tokens,
            prefix_cache_bytes=_prefix_cache_bytes(settings),
            prefix_cache_ttl=settings.prefix_cache_ttl,
            pack_weights=settings.pack_weights,
            tensor_parallel_size=settings.tensor_parallel_size,
            pipeline_parallel_size=settings.pipeline_parallel_size,
            distributed_executor_backend=settings.distributed_executor_backend,
            log_format=settings.log_format,
            options=settings.vllm_options,
        ),
    )


def _prefix_cache_bytes(settings: ServerSettings) -> int:
    return int(settings.prefix_cache_mib * 2**20)

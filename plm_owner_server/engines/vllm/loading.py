"""Loading of the vLLM engine from the server's settings."""

from __future__ import annotations

from pathlib import Path

from plm_owner_server.engines.interface import Engine
from plm_owner_server.engines.vllm.async_llm import VllmSettings, load_vllm_engine
from plm_owner_server.settings import ServerSettings


def load(folder: Path, settings: ServerSettings) -> Engine:
    """Load a model from its folder.

    Raises:
        InvalidRequest: vLLM is not installed, or refuses an option.
        Unsupported: the engine cannot serve this model.
    """
    return load_vllm_engine(
        folder,
        VllmSettings(
            dtype=settings.dtype,
            device=settings.device,
            threads=settings.threads,
            max_tokens=settings.max_sequence_tokens,
            batch_tokens=settings.max_batch_tokens,
            prefix_cache_bytes=settings.prefix_cache_bytes,
            prefix_cache_ttl=settings.prefix_cache_ttl,
            pack_weights=settings.pack_weights,
            tensor_parallel_size=settings.tensor_parallel_size,
            pipeline_parallel_size=settings.pipeline_parallel_size,
            distributed_executor_backend=settings.distributed_executor_backend,
            log_format=settings.log_format,
            options=settings.vllm_options,
        ),
    )

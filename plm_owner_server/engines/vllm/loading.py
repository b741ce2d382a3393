"""Loading of the vLLM engine: the options that vLLM is started with.

vLLM pins its own dependencies and may not be installed, so that it is only imported in functions, here, in `async_llm`
and in `internals`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from plm_owner_server.engines.interface import Engine
from plm_owner_server.engines.model_files.config import device_and_dtype
from plm_owner_server.engines.model_files.lm_head import caps_attention, read_head
from plm_owner_server.engines.vllm.async_llm import SHUTDOWN_SECONDS, VllmModel
from plm_owner_server.engines.vllm.engine import GenerationEngine
from plm_owner_server.engines.vllm.internals import HOOKS, check_version
from plm_owner_server.engines.vllm.model_runner import GenerationRunner
from plm_owner_server.engines.vllm.plugin import END_WITH_SERVER, LOG_FORMAT
from plm_owner_server.settings import ServerSettings
from protocol.cores import torch_threads
from protocol.errors import InvalidRequest, Unsupported

# Tokens in a block of attention states. The CPU kernel takes multiples of 32.
_BLOCK_TOKENS_CPU, _BLOCK_TOKENS_GPU = 32, 16
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",  # no reports to its makers
    "VLLM_LOGGING_CONFIG_PATH": str(Path(__file__).with_name("logging.json")),
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process has threads
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": str(SHUTDOWN_SECONDS),
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or two servers would take the same cores
    "PYTHONWARNINGS": "ignore:resource_tracker",  # it warns when it cleans up after a killed server
}
# Options that this module sets, with the server's flag for each, and options that rows are not computed with.
_RESERVED_OPTIONS = {
    "aux_output_config": "",
    "block_size": "",
    "convert": "",
    "data_parallel_size": "replicas of the server",
    "decode_context_parallel_size": "--tensor-parallel-size",
    "distributed_executor_backend": "--distributed-executor-backend",
    "dtype": "--dtype",
    "enable_batch_sharded_sampling": "",
    "enable_prefix_caching": "--prefix-cache-mib 0",
    "enable_return_routed_experts": "",
    "kv_transfer_config": "",
    "logits_processors": "",
    "max_model_len": "--max-sequence-tokens",
    "max_num_batched_tokens": "--max-batch-tokens",
    "model": "--model",
    "pipeline_parallel_size": "--pipeline-parallel-size",
    "pooler_config": "",
    "prefill_context_parallel_size": "--tensor-parallel-size",
    "runner": "",
    "scheduler_cls": "",
    "skip_tokenizer_init": "",
    "speculative_config": "",
    "stream_interval": "",
    "tensor_parallel_size": "--tensor-parallel-size",
    "worker_extension_cls": "",
}


@dataclass(frozen=True)
class VllmSettings:
    """Settings of vLLM for one model.

    Attributes:
        dtype: dtype of the weights; `auto` means bfloat16 on a GPU and float32 on a CPU.
        device: device of the LM head, which only clients' requests read; `auto` means the CPU.
        threads: threads of the model on a CPU; 0 means one for each core.
        max_tokens: longest sequence, in tokens; the model's own limit caps it.
        batch_tokens: largest number of tokens in one forward pass; longer prompts are run in pieces.
        prefix_cache_bytes: on a CPU, the memory for all attention states, those of running texts included. On GPUs
            vLLM takes the free memory. 0 disables the prefix cache.
        prefix_cache_ttl: seconds after their computation at which cached states are removed.
        tensor_parallel_size: number of GPUs that share every layer.
        pipeline_parallel_size: number of groups of GPUs, each with some of the layers.
        distributed_executor_backend: vLLM's backend that starts the workers; None lets vLLM choose.
        log_format: form of vLLM's log lines, `text` or `json`.
        options: further options of vLLM's `AsyncEngineArgs`, by name; they override those that follow from the other
            settings.
    """

    dtype: str = "auto"
    device: str = "auto"
    threads: int = 0
    max_tokens: int = 4096
    batch_tokens: int = 4096
    prefix_cache_bytes: int = 2**30
    prefix_cache_ttl: float = 600
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    distributed_executor_backend: str | None = None
    log_format: str = "text"
    options: dict[str, Any] = field(default_factory=dict)


def load_vllm_engine(folder: Path, settings: VllmSettings) -> GenerationEngine:
    """Start vLLM on a model.

    Raises:
        InvalidRequest: vLLM is not installed, or does not take an option.
        Unsupported: it is another version of vLLM, or it cannot run the model on this machine.
    """
    _check_options(settings.options)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ |= {END_WITH_SERVER: str(os.getpid()), LOG_FORMAT: settings.log_format}
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        raise InvalidRequest(
            f"vLLM cannot be imported: {error}.",
            hint="Run: pip install -e '.[server,vllm]', or without a GPU: make .venv-vllm/ready.",
        ) from error
    check_version()
    on_cpu = current_platform.is_cpu()
    if on_cpu or settings.threads:  # its processes do not know a container's quota
        os.environ["OMP_NUM_THREADS"] = str(torch_threads(settings.threads))
    if on_cpu:  # vLLM 0.32 cannot load what it has stored there, and compiles the model anew at each start
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    if on_cpu and caps_attention(folder):
        raise Unsupported(
            "vLLM 0.32 computes attention with soft-capped logits wrongly on a CPU.",
            hint="Serve this model with --engine transformers, or on a GPU.",
        )
    _, dtype = device_and_dtype("auto", settings.dtype, has_gpu=not on_cpu)
    # The model has a head of its own on its device.
    device, _ = device_and_dtype(settings.device, dtype, has_gpu=False)
    head, info = read_head(folder, dtype=getattr(torch, dtype), device=device)
    max_tokens = min(settings.max_tokens, info.max_tokens or settings.max_tokens)
    if max_tokens == info.max_tokens:  # vLLM's own limit counts the token that is chosen last, which is not run
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    arguments: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "dtype": dtype,
        "max_model_len": max_tokens + 1,
        "max_num_batched_tokens": settings.batch_tokens,
        "block_size": _BLOCK_TOKENS_CPU if on_cpu else _BLOCK_TOKENS_GPU,
        "enable_prefix_caching": settings.prefix_cache_bytes > 0,
        "disable_log_stats": True,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "distributed_executor_backend": settings.distributed_executor_backend,
    }
    if on_cpu:
        arguments["kv_cache_memory_bytes"] = settings.prefix_cache_bytes or 2**30
    model = VllmModel(arguments | settings.options | HOOKS, getattr(torch, dtype))
    runner = GenerationRunner(model, prefix_cache_ttl=settings.prefix_cache_ttl)
    return GenerationEngine(runner, info=info, head=head)


def _check_options(options: dict[str, Any]) -> None:
    for name in options:
        if name in _RESERVED_OPTIONS:
            flag = _RESERVED_OPTIONS[name]
            raise InvalidRequest(
                f"--vllm-options must not set {name}, which the server sets itself or does not support.",
                hint=f"Leave it out, and use {flag}." if flag else "Leave it out.",
            )


def load(folder: Path, settings: ServerSettings) -> Engine:
    """Load a model from its folder.

    Raises:
        InvalidRequest, Unsupported: see `load_vllm_engine`.
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
            tensor_parallel_size=settings.tensor_parallel_size,
            pipeline_parallel_size=settings.pipeline_parallel_size,
            distributed_executor_backend=settings.distributed_executor_backend,
            log_format=settings.log_format,
            options=settings.vllm_options,
        ),
    )

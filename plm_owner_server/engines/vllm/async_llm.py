"""vLLM as a model for `PooledEngine`: an `AsyncLLM` in this process, with its pooling runner, on an event loop.

No other module imports vLLM, which pins its own dependencies and may not be installed. Written for version 0.32.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from plm_owner_server.engines.model_files.config import architecture, device_and_dtype
from plm_owner_server.engines.model_files.lm_head import caps_attention, read_head
from plm_owner_server.engines.vllm.engine import PooledEngine
from plm_owner_server.engines.vllm.model_runner import HiddenStateQuery, HiddenStates, PooledRunner
from plm_owner_server.engines.vllm.plugin import END_WITH_SERVER, LOG_FORMAT
from plm_owner_server.logs import redact_task_exceptions
from protocol.cores import torch_threads
from protocol.errors import InvalidRequest, ServerFault, Unsupported

# A step computes the last, incomplete block again, so that vLLM's default of 128 is slow. The CPU kernel takes
# multiples of 32.
_BLOCK_TOKENS_CPU, _BLOCK_TOKENS_GPU = 32, 16
# vLLM kills its processes after 5 s by default, which may be too early.
_SHUTDOWN_SECONDS, _JOIN_SECONDS = 20, 30
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",  # no reports to its makers
    "VLLM_LOGGING_CONFIG_PATH": str(Path(__file__).with_name("logging.json")),
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process has threads
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": str(_SHUTDOWN_SECONDS),
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or two servers would take the same cores
    "PYTHONWARNINGS": "ignore:resource_tracker",  # it warns when it cleans up after a killed server
}
# Share of a GPU's memory that vLLM takes by default, and memory that it must leave free beside our LM head.
_GPU_SHARE, _GPU_SPARE_BYTES = 0.92, 2**30
_RESET_CACHE_SECONDS = 30.0
# Options that this module sets, and the server's flag for each.
_RESERVED_OPTIONS = {
    "async_scheduling": "",
    "block_size": "",
    "convert": "",
    "distributed_executor_backend": "--distributed-executor-backend",
    "dtype": "--dtype",
    "enable_prefix_caching": "--prefix-cache-mib 0",
    "max_model_len": "--max-sequence-tokens",
    "max_num_batched_tokens": "--max-batch-tokens",
    "model": "--model",
    "pipeline_parallel_size": "--pipeline-parallel-size",
    "pooler_config": "",
    "runner": "",
    "skip_tokenizer_init": "",
    "tensor_parallel_size": "--tensor-parallel-size",
}


@dataclass(frozen=True)
class VllmSettings:
    """Settings of vLLM for one model.

    Attributes:
        dtype: dtype of the weights; `auto` means bfloat16 on a GPU and float32 on a CPU.
        device: device of the LM head; `auto` means the first GPU if there is one.
        threads: threads of the model on a CPU; 0 means one for each core.
        max_tokens: longest sequence, in tokens; the model's own limit caps it.
        batch_tokens: largest number of tokens in one forward pass; raised to `max_tokens` if it is smaller.
        prefix_cache_bytes: on a CPU, the memory for all attention states, those of running texts included. On GPUs
            vLLM takes the free memory. 0 disables the prefix cache.
        prefix_cache_ttl: seconds after their computation at which cached states are removed.
        pack_weights: on a CPU, also hold the LM head in a faster layout.
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
    pack_weights: bool = False
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    distributed_executor_backend: str | None = None
    log_format: str = "text"
    options: dict[str, Any] = field(default_factory=dict)


def load_vllm_engine(folder: Path, settings: VllmSettings) -> PooledEngine:
    """Start vLLM on a model.

    Raises:
        InvalidRequest: vLLM is not installed, or does not take an option.
        Unsupported: vLLM cannot run the model on this machine.
    """
    for name in settings.options:
        if name in _RESERVED_OPTIONS:
            flag = _RESERVED_OPTIONS[name]
            raise InvalidRequest(
                f"--vllm-options must not set {name}, which the server sets itself.",
                hint=f"Leave it out, and use {flag}." if flag else "Leave it out.",
            )
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
    on_cpu = current_platform.is_cpu()
    if on_cpu or settings.threads:  # its processes do not know a container's quota
        os.environ["OMP_NUM_THREADS"] = str(torch_threads(settings.threads))
    if on_cpu and caps_attention(folder):
        raise Unsupported(
            "vLLM 0.32 computes attention with soft-capped logits wrongly on a CPU.",
            hint="Serve this model with --engine transformers, or on a GPU.",
        )
    _, dtype = device_and_dtype("auto", settings.dtype, has_gpu=not on_cpu)
    device, _ = device_and_dtype(settings.device, dtype, has_gpu=not on_cpu)
    head, info = read_head(folder, dtype=getattr(torch, dtype), device=device)
    max_tokens = min(settings.max_tokens, info.max_tokens or settings.max_tokens)
    arguments: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "runner": "pooling",
        "convert": "embed",
        "dtype": dtype,
        "max_model_len": max_tokens,
        # Or vLLM would return the states of a long text in pieces.
        "max_num_batched_tokens": max(settings.batch_tokens, max_tokens),
        "async_scheduling": False,
        "block_size": _BLOCK_TOKENS_CPU if on_cpu else _BLOCK_TOKENS_GPU,
        "enable_prefix_caching": settings.prefix_cache_bytes > 0,
        "disable_log_stats": True,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "distributed_executor_backend": settings.distributed_executor_backend,
    }
    if on_cpu:
        arguments["kv_cache_memory_bytes"] = settings.prefix_cache_bytes or 2**30
    elif head.weight_V_D.is_cuda:
        total = torch.cuda.get_device_properties(head.weight_V_D.device).total_memory
        arguments["gpu_memory_utilization"] = share_beside(head.weight_V_D.nbytes, total)
    runner = PooledRunner(VllmModel(arguments | settings.options), prefix_cache_ttl=settings.prefix_cache_ttl)
    return PooledEngine(runner, info=info, head=head, pack_weights=settings.pack_weights)


def share_beside(head_bytes: int, total_bytes: int) -> float:
    """Share of a GPU's memory that vLLM may take beside our LM head; vLLM refuses to start if less is free."""
    return round(min(_GPU_SHARE, 1 - (head_bytes + _GPU_SPARE_BYTES) / total_bytes), 3)


class VllmModel:
    """A model in vLLM, with an event loop in a separate thread. Its processes end when the object is collected.

    Args:
        arguments: arguments of vLLM's `AsyncEngineArgs`, by name.

    Attributes:
        block_tokens: number of tokens in a block; prefixes are cached in whole blocks.

    Raises:
        InvalidRequest: vLLM does not take an argument.
        Unsupported: vLLM cannot run the model.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._loop = asyncio.new_event_loop()
        redact_task_exceptions(self._loop)
        thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        thread.start()
        try:
            self._llm = asyncio.run_coroutine_threadsafe(_start(arguments), self._loop).result()
        except BaseException:
            self._loop.call_soon_threadsafe(self._loop.stop)
            raise
        weakref.finalize(self, _shut_down, self._llm, self._loop, thread)
        self.block_tokens = int(arguments["block_size"])
        self._request_ids = itertools.count()

    def run(self, queries: Sequence[HiddenStateQuery]) -> list[HiddenStates]:
        """Results of all queries, in their order."""
        return asyncio.run_coroutine_threadsafe(self._run_all(queries), self._loop).result()

    def reset_cache(self) -> bool:
        """Remove all cached states. Return whether they could be removed.

        Raises:
            TimeoutError: vLLM did not report; an engine that dies meanwhile never does.
        """
        future = asyncio.run_coroutine_threadsafe(self._llm.reset_prefix_cache(), self._loop)
        return bool(future.result(_RESET_CACHE_SECONDS))

    def is_alive(self) -> bool:
        """Return whether all of its processes still run."""
        return not self._llm.errored

    async def _run_all(self, queries: Sequence[HiddenStateQuery]) -> list[HiddenStates]:
        # Waits for all, also after an error, so that no query is left running.
        results = await asyncio.gather(*map(self._run, queries), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if isinstance(result, HiddenStates)]

    async def _run(self, query: HiddenStateQuery) -> HiddenStates:
        from vllm.pooling_params import PoolingParams

        params = PoolingParams(
            task="embed" if query.last_only else "token_embed",
            use_activation=False,  # it would normalise the states
            skip_reading_prefix_cache=query.skip_cache,
        )
        # The salt separates the cached states of tenants.
        prompt = {"prompt_token_ids": query.token_ids, "cache_salt": f"tenant {query.tenant}"}
        async for output in self._llm.encode(prompt, params, str(next(self._request_ids))):
            hidden = output.outputs.data
            return HiddenStates(
                output.prompt_token_ids, hidden[None] if query.last_only else hidden, output.num_cached_tokens
            )
        raise ServerFault("vLLM returned no result.", hint="Try again.")


async def _start(arguments: dict[str, Any]) -> Any:
    from vllm import AsyncEngineArgs
    from vllm.config import PoolerConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    pooler = PoolerConfig(use_activation=False, seq_pooling_type="LAST", tok_pooling_type="ALL")
    try:
        options = AsyncEngineArgs(**arguments, pooler_config=pooler)
    except TypeError as error:
        raise InvalidRequest(f"vLLM does not take this: {error}", hint="Check --vllm-options.") from error
    try:
        return AsyncLLM.from_engine_args(options)
    except (ValueError, RuntimeError) as error:
        raise Unsupported(
            f"vLLM cannot run {architecture(Path(options.model))} with these settings: {error}",
            hint="vLLM's log has details. If memory is short: a smaller --max-sequence-tokens, on a CPU a larger "
            """--prefix-cache-mib, on GPUs --vllm-options '{"gpu_memory_utilization": 0.8}' or more of them """
            "(--tensor-parallel-size). Or try --engine transformers.",
        ) from error


def _shut_down(llm: Any, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    asyncio.run_coroutine_threadsafe(_shut_down_on_loop(llm, loop), loop)
    if thread is not threading.current_thread():
        thread.join(_JOIN_SECONDS)


async def _shut_down_on_loop(llm: Any, loop: asyncio.AbstractEventLoop) -> None:
    """Shut down vLLM and stop the loop."""
    # Its tasks first, or they would log the end as a failure.
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    try:
        llm.shutdown(timeout=_SHUTDOWN_SECONDS)
    finally:
        loop.stop()

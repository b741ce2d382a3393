"""vLLM, as `PooledEngine` asks it: an `AsyncLLM` in this process, with the runner for pooling, on an event loop.

Nothing else here imports vLLM, which pins versions of its own and may not be installed. Written for version 0.32.
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

from plm_owner_server.engines.model_files.config import device_and_dtype
from plm_owner_server.engines.model_files.lm_head import caps_attention, read_head
from plm_owner_server.engines.vllm.engine import PooledEngine
from plm_owner_server.engines.vllm.model_runner import HiddenStateQuery, HiddenStates, PooledRunner
from plm_owner_server.engines.vllm.plugin import END_WITH_SERVER, LOG_FORMAT
from plm_owner_server.logs import redact_task_exceptions
from protocol.errors import InvalidRequest, ServerFault, Unsupported

# The CPU kernel takes multiples of 32, and a step computes what is not a whole block again; vLLM's own 128 is slow.
_BLOCK_TOKENS_CPU, _BLOCK_TOKENS_GPU = 32, 16
# Its processes may need more than the 5 s of its own before they are killed.
_ENDS_ITSELF_WITHIN_S, _END_WITHIN_S = 20, 30
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",  # it would report to its makers
    "VLLM_LOGGING_CONFIG_PATH": str(Path(__file__).with_name("vllm_logs.json")),
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process has threads
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": str(_ENDS_ITSELF_WITHIN_S),
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or two servers would take the same cores
    "PYTHONWARNINGS": "ignore:resource_tracker",  # it tidies up behind a server that had to end at once, and says so
}
# Of a GPU's memory, what vLLM takes by itself, and what it must leave for us beside the LM head.
_GPU_SHARE, _GPU_SPARE_BYTES = 0.92, 2**30
_FORGET_WITHIN_S = 30.0
# What this module relies on, and the flag that says it.
_NOT_OPTIONS = {
    "async_scheduling": "",
    "block_size": "",
    "convert": "",
    "data_parallel_size": "--data-parallel-size",
    "distributed_executor_backend": "--distributed-executor-backend",
    "dtype": "--dtype",
    "enable_prefix_caching": "--prefix-cache-mib 0",
    "max_model_len": "--max-sequence-tokens",
    "max_num_batched_tokens": "--batch-tokens",
    "model": "--model",
    "pipeline_parallel_size": "--pipeline-parallel-size",
    "pooler_config": "",
    "runner": "",
    "skip_tokenizer_init": "",
    "tensor_parallel_size": "--tensor-parallel-size",
}


@dataclass(frozen=True)
class VllmSettings:
    """How vLLM runs a model.

    Attributes:
        dtype: of the weights; auto means bfloat16 on a GPU, float32 on a CPU.
        device: where the LM head is; auto means on the first GPU if there is one.
        threads: of the model on a CPU, 0 for all cores.
        max_tokens: longest sequence, capped by the model's own.
        batch_tokens: tokens in one forward pass; no fewer than the longest sequence has.
        prefix_cache_bytes: on a CPU the memory for attention states, those of running texts included; on GPUs vLLM
            takes what is free. 0 keeps nothing of a text that is done.
        prefix_cache_seconds: how long something may be known of a text.
        pack_weights: on a CPU, hold the LM head in a faster layout, too.
        tensor_parallel_size: GPUs that share every layer.
        pipeline_parallel_size: groups of GPUs with some of the layers each.
        data_parallel_size: copies of the model.
        distributed_executor_backend: what starts the workers; None lets vLLM choose.
        log_format: of vLLM's lines, as for `set_up_logs`.
        options: other ones of vLLM's own `AsyncEngineArgs`, by name; these win.
    """

    dtype: str = "auto"
    device: str = "auto"
    threads: int = 0
    max_tokens: int = 4096
    batch_tokens: int = 4096
    prefix_cache_bytes: int = 2**30
    prefix_cache_seconds: float = 600
    pack_weights: bool = False
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    distributed_executor_backend: str | None = None
    log_format: str = "text"
    options: dict[str, Any] = field(default_factory=dict)


def load_vllm_engine(folder: Path, settings: VllmSettings) -> PooledEngine:
    """Start vLLM on a model.

    Raises:
        InvalidRequest: vLLM is not installed, or does not take an option.
        Unsupported: the model is not one that it can run here.
    """
    for name in settings.options:
        if name in _NOT_OPTIONS:
            raise InvalidRequest(
                f"--vllm-options cannot say {name}: the server itself relies on it.",
                hint=f"Leave it out, and say {_NOT_OPTIONS[name]}." if _NOT_OPTIONS[name] else "Leave it out.",
            )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ |= {END_WITH_SERVER: str(os.getpid()), LOG_FORMAT: settings.log_format}
    if settings.threads:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        raise InvalidRequest(
            f"vLLM cannot be imported: {error}.",
            hint="Run: pip install 'pema[server,vllm]', or without a GPU: make .venv-vllm/ready.",
        ) from error
    on_cpu = current_platform.is_cpu()
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
        # Or the states of a text would come in pieces.
        "max_num_batched_tokens": max(settings.batch_tokens, max_tokens),
        "async_scheduling": False,
        "block_size": _BLOCK_TOKENS_CPU if on_cpu else _BLOCK_TOKENS_GPU,
        "enable_prefix_caching": settings.prefix_cache_bytes > 0,
        "disable_log_stats": True,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "data_parallel_size": settings.data_parallel_size,
        "distributed_executor_backend": settings.distributed_executor_backend,
    }
    if on_cpu:
        arguments["kv_cache_memory_bytes"] = settings.prefix_cache_bytes or 2**30
    elif head.weight_V_D.is_cuda:
        total = torch.cuda.get_device_properties(head.weight_V_D.device).total_memory
        arguments["gpu_memory_utilization"] = share_beside(head.weight_V_D.nbytes, total)
    runner = PooledRunner(VllmModel(arguments | settings.options), forget_after_s=settings.prefix_cache_seconds)
    return PooledEngine(runner, info=info, head=head, pack_weights=settings.pack_weights)


def share_beside(head_bytes: int, total_bytes: int) -> float:
    """The part of a GPU's memory that vLLM may take where our LM head is there first: it refuses to start with less."""
    return round(min(_GPU_SHARE, 1 - (head_bytes + _GPU_SPARE_BYTES) / total_bytes), 3)


class VllmModel:
    """A model in vLLM, with its event loop in a thread of its own; its processes end when nobody has it any more.

    Args:
        arguments: of `AsyncEngineArgs`.

    Attributes:
        block_tokens: beginnings are known in multiples of so many tokens.

    Raises:
        InvalidRequest: vLLM does not take an argument.
        Unsupported: it cannot run the model.
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
        weakref.finalize(self, _end, self._llm, self._loop, thread)
        self.block_tokens = int(arguments["block_size"])
        self._numbers = itertools.count()

    def answer(self, questions: Sequence[HiddenStateQuery]) -> list[HiddenStates]:
        """Answers to all questions, in their order."""
        return asyncio.run_coroutine_threadsafe(self._answers(questions), self._loop).result()

    def forget(self) -> bool:
        """Drop all that is known of texts; whether it could be dropped.

        Raises:
            TimeoutError: it does not say so; an engine that dies meanwhile never does.
        """
        future = asyncio.run_coroutine_threadsafe(self._llm.reset_prefix_cache(), self._loop)
        return bool(future.result(_FORGET_WITHIN_S))

    def is_alive(self) -> bool:
        """Whether none of its processes has ended."""
        return not self._llm.errored

    async def _answers(self, questions: Sequence[HiddenStateQuery]) -> list[HiddenStates]:
        # All of them, also after an error: none goes on unattended.
        answers = await asyncio.gather(*map(self._answer, questions), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return [answer for answer in answers if isinstance(answer, HiddenStates)]

    async def _answer(self, question: HiddenStateQuery) -> HiddenStates:
        from vllm.pooling_params import PoolingParams

        params = PoolingParams(
            task="embed" if question.newest else "token_embed",
            use_activation=False,  # which would normalise
            skip_reading_prefix_cache=question.anew,
        )
        # With the name of its tenant, so that no other finds what is known of it.
        prompt = {"prompt_token_ids": question.token_ids, "cache_salt": f"tenant {question.tenant}"}
        async for output in self._llm.encode(prompt, params, str(next(self._numbers))):
            hidden = output.outputs.data
            return HiddenStates(
                output.prompt_token_ids, hidden[None] if question.newest else hidden, output.num_cached_tokens
            )
        raise ServerFault("vLLM has given no answer.", hint="Try again.")


async def _start(arguments: dict[str, Any]) -> Any:
    from vllm import AsyncEngineArgs
    from vllm.config import PoolerConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    pooler = PoolerConfig(use_activation=False, seq_pooling_type="LAST", tok_pooling_type="ALL")
    try:
        options = AsyncEngineArgs(**arguments, pooler_config=pooler)
    except TypeError as error:
        raise InvalidRequest(f"vLLM does not take this: {error}", hint="Look at --vllm-options.") from error
    try:
        return AsyncLLM.from_engine_args(options)
    except (ValueError, RuntimeError) as error:
        raise Unsupported(
            f"vLLM cannot run this model so: {error}",
            hint="Its own log says more. If memory is short: a smaller --max-sequence-tokens, on a CPU a larger "
            """--prefix-cache-mib, on GPUs --vllm-options '{"gpu_memory_utilization": 0.8}' or more of them """
            "(--tensor-parallel-size). Or try --engine transformers.",
        ) from error


def _end(llm: Any, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    asyncio.run_coroutine_threadsafe(_end_here(llm, loop), loop)
    if thread is not threading.current_thread():
        thread.join(_END_WITHIN_S)


async def _end_here(llm: Any, loop: asyncio.AbstractEventLoop) -> None:
    """End vLLM and the loop; its own tasks first, or they log its end as a failure."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    try:
        llm.shutdown(timeout=_ENDS_ITSELF_WITHIN_S)
    finally:
        loop.stop()

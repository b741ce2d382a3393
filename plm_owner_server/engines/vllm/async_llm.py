"""vLLM as a model for `GenerationEngine`: an `AsyncLLM` in this process, on an event loop."""

from __future__ import annotations

import asyncio
import itertools
import threading
import weakref
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from plm_owner_server.engines.model_files.config import architecture
from plm_owner_server.engines.vllm.internals import START_ROWS, missing_names
from plm_owner_server.engines.vllm.model_runner import TextQuery, TextRows
from plm_owner_server.engines.vllm.rows import RowRequest, unpack_rows
from plm_owner_server.logs import redact_task_exceptions
from protocol.errors import InvalidRequest, NotReady, Unsupported

SHUTDOWN_SECONDS = 20
"""Time that vLLM's processes get to end. Its own default of 5 s may be too short."""

_JOIN_SECONDS = 30
_RESET_CACHE_SECONDS = 30.0


class VllmModel:
    """A model in vLLM, with an event loop in a separate thread. Its processes end when the object is collected.

    Args:
        arguments: arguments of vLLM's `AsyncEngineArgs`, by name.
        dtype: dtype of the model.

    Raises:
        InvalidRequest: vLLM does not take an argument.
        Unsupported: vLLM cannot run the model, or lacks internals that rows need.
    """

    def __init__(self, arguments: dict[str, Any], dtype: torch.dtype) -> None:
        self._dtype = dtype
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
        self._request_ids = itertools.count()

    def submit(self, query: TextQuery) -> Future[TextRows]:
        """A result to come. Cancelling it aborts the request in vLLM."""
        coroutine = _generate(self._llm, query, str(next(self._request_ids)), self._dtype)
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def pulse(self) -> Future[bool]:
        """A result that comes once vLLM has ended its present pass."""
        return asyncio.run_coroutine_threadsafe(self._llm.is_sleeping(), self._loop)

    def reset_cache(self) -> bool:
        """Remove all cached states, also those of running texts, which vLLM computes again.

        Raises:
            TimeoutError: vLLM did not report; an engine that dies meanwhile never does.
        """
        reset = self._llm.reset_prefix_cache(reset_running_requests=True)
        return bool(asyncio.run_coroutine_threadsafe(reset, self._loop).result(_RESET_CACHE_SECONDS))

    def is_alive(self) -> bool:
        """Return whether all of its processes still run."""
        return not self._llm.errored


async def _generate(llm: Any, query: TextQuery, request_id: str, dtype: torch.dtype) -> TextRows:
    """Run a query as one request.

    Raises:
        NotReady: vLLM returned no rows.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    wanted = RowRequest(query.start, query.start if query.scored else None, len(query.token_ids))
    params = SamplingParams(
        max_tokens=query.look_ahead + 1,  # the last one is chosen, but not run
        temperature=0.0,
        ignore_eos=True,
        stop_token_ids=sorted(query.stop_token_ids),
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=wanted.to_extra_args(),
    )
    # The salt separates the cached states of tenants.
    prompt = {"prompt_token_ids": query.token_ids, "cache_salt": f"tenant {query.tenant}"}
    async for output in llm.generate(prompt, params, request_id):
        completion = output.outputs[0]
        if completion.routed_experts is None:
            break
        rows, drafted = unpack_rows(completion.routed_experts, dtype), list(completion.token_ids)
        top1_N = rows.top1_N.long()
        top1_N[-len(drafted) :] = torch.tensor(drafted)[-len(top1_N) :]
        return TextRows(
            hidden_T_D=rows.hidden_N_D,
            logsumexp_T=rows.logsumexp_N,
            top1_logit_T=rows.top1_logit_N,
            top1_T=top1_N,
            ran_token_ids=rows.token_ids_N.tolist(),
            drafted=drafted,
            cached_tokens=output.num_cached_tokens,
        )
    raise NotReady("vLLM returned no rows.", hint="Try again.", retry_after_s=1.0)


async def _start(arguments: dict[str, Any]) -> Any:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    try:
        options = AsyncEngineArgs(**arguments)
    except TypeError as error:
        raise InvalidRequest(f"vLLM does not take this: {error}", hint="Check --vllm-options.") from error
    try:
        llm = AsyncLLM.from_engine_args(options)
    except (ValueError, RuntimeError) as error:
        raise Unsupported(
            f"vLLM cannot run {architecture(Path(options.model))} with these settings: {error}",
            hint="vLLM's log has details. If memory is short: a smaller --max-sequence-tokens, on a CPU a larger "
            """--prefix-cache-mib, on GPUs --vllm-options '{"gpu_memory_utilization": 0.8}' or more of them """
            "(--tensor-parallel-size). Or try --engine transformers.",
        ) from error
    missing = sorted({*missing_names(), *(name for names in await llm.collective_rpc(START_ROWS) for name in names)})
    if missing:
        llm.shutdown(timeout=SHUTDOWN_SECONDS)
        raise Unsupported(
            f"This build of vLLM lacks {missing[0]}, which the server relies on.",
            hint="Install vLLM as pyproject.toml pins it, or try --engine transformers.",
        )
    return llm


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
        llm.shutdown(timeout=SHUTDOWN_SECONDS)
    finally:
        # vLLM's finalizer would do it again, perhaps when the interpreter has dropped the modules that it needs.
        llm.shutdown = lambda timeout=None: None
        loop.stop()

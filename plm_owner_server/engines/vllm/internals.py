"""The only module that relies on vLLM's internals, as they are in version 0.32: it adds rows to what vLLM generates.

Three hooks that vLLM offers are used. `worker_extension_cls` adds a method to the workers, which the server calls once
after the start: it puts a mixin before the class of the model runner. `scheduler_cls` names a subclass of vLLM's
scheduler. `routed_experts`, an array that goes from the scheduler to each request's result, carries the rows. vLLM's
files are not changed, and its passes, graphs and sampling are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plm_owner_server.engines.vllm.block_texts import BlockTexts, Parent
from plm_owner_server.engines.vllm.row_selection import RowLedger, RowSelection, Span, compute_rows, select_rows
from plm_owner_server.engines.vllm.rows import RowRequest, pack_rows
from protocol.errors import Unsupported

VERSION = "0.32"
"""The version of vLLM, without its last part, that this module is written for."""

HOOKS = {"worker_extension_cls": f"{__name__}.RowExtension", "scheduler_cls": f"{__name__}.row_scheduler"}
"""Arguments of vLLM's `AsyncEngineArgs` that name the hooks."""

START_ROWS = "start_rows"
"""Method of `RowExtension` that must be called once on all workers. It returns the names that vLLM lacks."""

_OUTPUT = "pema"  # key in ModelRunnerOutput.aux_output_connector_output
_RUNNER_NAMES = ("execute_model", "sample_tokens", "model", "model_config")


def check_version() -> None:
    """Refuse another version of vLLM, whose internals may differ.

    Raises:
        Unsupported: the installed version is another one.
    """
    import vllm

    if vllm.__version__.split(".")[:2] != VERSION.split("."):
        raise Unsupported(
            f"This server needs vLLM {VERSION}; vLLM {vllm.__version__} is installed.",
            hint=f"Run: pip install 'vllm=={VERSION}.*', or without a GPU: make .venv-vllm/ready.",
        )


@dataclass
class PassRows:
    """Rows of one pass. vLLM's executor for Ray needs the name `rows`.

    Attributes:
        rows: uint8 [N, bytes of a row].
        spans: the rows of each request, in their order.
    """

    rows: np.ndarray[Any, Any] | None
    spans: dict[str, Span]


class _RowRunner:
    """Before the class of either model runner."""

    needs: tuple[str, ...]
    _row_requests: dict[str, RowRequest]
    model: Any
    model_config: Any

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Note which rows new requests want."""
        for name in scheduler_output.finished_req_ids:
            self._row_requests.pop(name, None)
        for new in scheduler_output.scheduled_new_reqs:
            if request := RowRequest.of(new.sampling_params):
                self._row_requests[new.req_id] = request
        return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]

    def _pack(
        self, selection: RowSelection, hidden_T_D: Tensor, token_ids_T: Tensor, logits_B_V: Tensor | None
    ) -> Tensor | None:
        """Rows as bytes; None on ranks whose output the executor does not read."""
        if not selection.indices:
            return None
        vocab_size = self.model_config.get_vocab_size()
        rows = compute_rows(selection, hidden_T_D, token_ids_T, logits_B_V, self.model.compute_logits, vocab_size)
        return pack_rows(rows) if _is_first_tensor_rank() else None


class RowsOfRunner1(_RowRunner):
    """Rows of model runner 1, which runs on CPUs."""

    needs = (
        "execute_model_state",
        "input_batch",
        "input_ids",
        "query_start_loc",
        "_get_or_create_async_output_copy_stream",
    )

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        """Compute the rows of the last pass, then sample."""
        state: Any = self.execute_model_state  # type: ignore[attr-defined]
        selection, packed_N_B = RowSelection(), None
        if state is not None and self._row_requests:
            batch: Any = self.input_batch  # type: ignore[attr-defined]
            offsets_B = self.query_start_loc.np[: batch.num_reqs + 1]  # type: ignore[attr-defined]
            computed_B = batch.num_computed_tokens_cpu[: batch.num_reqs]
            selection = select_rows(list(batch.req_ids), self._row_requests, computed_B, offsets_B)
            token_ids_T = self.input_ids.gpu  # type: ignore[attr-defined]
            packed_N_B = self._pack(selection, state.hidden_states, token_ids_T, state.logits)
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        return _with_rows(output, packed_N_B, selection.spans, self._copy_stream)

    def _copy_stream(self) -> Any:
        return self._get_or_create_async_output_copy_stream()  # type: ignore[attr-defined]


class RowsOfRunner2(_RowRunner):
    """Rows of model runner 2, which runs on GPUs."""

    needs = ("sample", "output_copy_stream")
    _selection = RowSelection()
    _packed_N_B: Tensor | None = None

    @torch.inference_mode()
    def sample(self, hidden_states: Tensor, input_batch: Any, grammar_output: Any) -> Any:
        """Sample, and compute the rows from the logits that were computed for it."""
        if not self._row_requests:
            return super().sample(hidden_states, input_batch, grammar_output)  # type: ignore[misc]
        computed: list[Tensor | None] = []
        compute_logits = self.model.compute_logits

        def keeping(*args: Any, **kwargs: Any) -> Tensor | None:
            computed.append(compute_logits(*args, **kwargs))
            return computed[-1]

        self.model.__dict__["compute_logits"] = keeping
        try:
            result = super().sample(hidden_states, input_batch, grammar_output)  # type: ignore[misc]
        finally:
            del self.model.__dict__["compute_logits"]
        self._selection = select_rows(
            input_batch.req_ids,
            self._row_requests,
            input_batch.num_computed_tokens_np,
            input_batch.query_start_loc_np,
        )
        self._packed_N_B = self._pack(self._selection, hidden_states, input_batch.input_ids, computed[0])
        return result

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample, and add the rows to the output."""
        self._packed_N_B = None
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        packed_N_B, self._packed_N_B = self._packed_N_B, None
        return _with_rows(output, packed_N_B, self._selection.spans, self._copy_stream)

    def _copy_stream(self) -> Any:
        return self.output_copy_stream  # type: ignore[attr-defined]


class RowExtension:
    """Methods that vLLM adds to the class of its workers."""

    model_runner: Any

    def start_rows(self) -> list[str]:
        """Put the mixin before the model runner's class. Return the names that the runner lacks."""
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        runner = self.model_runner
        mixin = RowsOfRunner1 if isinstance(runner, GPUModelRunner) else RowsOfRunner2
        missing = [name for name in (*_RUNNER_NAMES, *mixin.needs) if not hasattr(runner, name)]
        if not missing and not isinstance(runner, _RowRunner):
            runner._row_requests = {}
            runner.__class__ = type(f"{mixin.__name__}{type(runner).__name__}", (mixin, type(runner)), {})
        return missing


class _RowScheduler:
    """Before the class of vLLM's scheduler."""

    requests: dict[str, Any]
    kv_cache_manager: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ledger = RowLedger()
        self._ended = _EndedTexts(self.kv_cache_manager)
        look_up = self.kv_cache_manager.get_computed_blocks

        def look_up_before_start(request: Any) -> Any:
            wanted = RowRequest.of(request.sampling_params)
            if wanted is not None and wanted.start + 1 < request.num_tokens:
                request = _ShorterRequest(request, wanted.start + 1)
            return self._ended.extend(request, *look_up(request))

        self.kv_cache_manager.get_computed_blocks = look_up_before_start

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Accept the rows of a pass, and add those of finished requests to their results."""
        found: PassRows | None = (model_runner_output.aux_output_connector_output or {}).get(_OUTPUT)
        # Requests of the pass, before those that finish with it are removed.
        requests = {} if found is None else {name: self.requests.get(name) for name in found.spans}
        results = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        if found is not None and found.rows is not None:
            self._accept(found.rows, found.spans, requests)
        for result in results.values():
            for output in result.outputs:
                if output.finished:  # only now: a message for each pass would cost more
                    output.routed_experts = self._ledger.take(output.request_id)
        self._ledger.keep_only(self.requests)
        return results

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        """Also drop the rows of requests that are aborted."""
        finished = super().finish_requests(request_ids, finished_status)  # type: ignore[misc]
        self._ledger.keep_only(self.requests)
        return finished

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Also forget the blocks of texts that have ended."""
        self._ended.clear()
        return bool(super().reset_prefix_cache(*args, **kwargs))  # type: ignore[misc]

    def _free_request_blocks(self, request: Any) -> None:
        self._ended.keep(request, partial(super()._free_request_blocks, request))  # type: ignore[misc]

    def _accept(self, rows: np.ndarray[Any, Any], spans: dict[str, Span], requests: dict[str, Any]) -> None:
        end = 0
        for name, span in spans.items():
            begin, end = end, end + span[1]
            request = requests[name]
            wanted = None if request is None else RowRequest.of(request.sampling_params)
            if wanted is not None:
                self._ledger.accept(name, wanted, span, rows[begin:end], request.num_tokens - 1)


class _EndedTexts:
    """Blocks of texts that have ended, of which a text that begins alike takes a copy, up to where it differs.

    vLLM copies a block that only begins as wanted, but looks for such blocks for models with Mamba layers only.

    Args:
        kv_cache_manager: vLLM's manager of blocks.
    """

    def __init__(self, kv_cache_manager: Any) -> None:
        self._manager, self._pool = kv_cache_manager, kv_cache_manager.block_pool
        self._groups = kv_cache_manager.coordinator.single_type_managers
        self._block_tokens: int = self._pool.hash_block_size
        self._is_used = kv_cache_manager.enable_caching and all(map(self._has_a_state_for_each_token, self._groups))
        self._texts = BlockTexts()
        # The first block of each running text that was not in the prefix cache as a whole.
        self._first_missed: dict[str, int] = {}

    def _has_a_state_for_each_token(self, group: Any) -> bool:
        from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SlidingWindowManager
        from vllm.v1.kv_cache_interface import iter_layer_specs

        return (
            type(group) in (FullAttentionManager, SlidingWindowManager)
            and group.block_size == self._block_tokens
            and all(
                spec.prefix_cacheable and spec.tokens_per_state == 1 for spec in iter_layer_specs(group.kv_cache_spec)
            )
        )

    def extend(self, request: Any, blocks: Any, tokens: int, boundary: int) -> tuple[Any, int, int]:
        """Return the whole cached blocks of a text, and after them the block that begins like its next tokens.

        Args:
            request: the text; its last token must be run.
            blocks: its whole cached blocks.
            tokens: number of their tokens.
            boundary: passed on.
        """
        if not self._is_used or not self._manager.prefix_cache_lookup_enabled(request):
            return blocks, tokens, boundary
        number = self._first_missed[request.request_id] = tokens // self._block_tokens
        rest = request.all_token_ids[tokens : min(tokens + self._block_tokens, request.num_tokens) - 1]
        ids, shared = self._texts.longest_prefix(_parent(request, number), rest)
        if not shared or not self._has_room_for_a_copy(request):
            return blocks, tokens, boundary
        found = self._manager.create_kv_cache_blocks(tuple([self._pool.blocks[block]] for block in ids))
        return blocks + found, tokens + shared, boundary

    def _has_room_for_a_copy(self, request: Any) -> bool:
        """Return whether the pool has room for a text and one block more, which is held until it is copied.

        Otherwise vLLM would never admit the text, nor those that wait behind it.
        """
        needed = -(-len(request.all_token_ids) // self._block_tokens) + 1
        usable: int = self._pool.num_gpu_blocks - 1  # one stands for blocks that have left a window
        return len(self._groups) * needed <= usable

    def keep(self, request: Any, free: Callable[[], None]) -> None:
        """Free the blocks of a text. If it has ended, vLLM uses two of them again last: those that may be wanted.

        Args:
            request: the text.
            free: frees all of its blocks.
        """
        if not self._is_used or not request.is_finished():
            free()
            return
        missed = self._first_missed.pop(request.request_id, 0)
        ran = min(request.num_computed_tokens, request.num_tokens - 1)
        # The last one for this text's next round; the first for texts that differ from there on.
        kept = []
        for number in sorted({missed, max(0, ran - 1) // self._block_tokens}):
            begin, end = number * self._block_tokens, min((number + 1) * self._block_tokens, ran)
            blocks = [group.req_to_blocks[request.request_id][number : number + 1] for group in self._groups]
            if begin < end and all(block and not block[0].is_null for block in blocks):
                kept.append((number, request.all_token_ids[begin:end], [block[0] for block in blocks]))
        for *_, blocks in kept:
            self._pool.touch(blocks)
        free()
        for number, token_ids, blocks in kept:
            self._texts.add(_parent(request, number), token_ids, tuple(block.block_id for block in blocks))
            self._pool.unpin_blocks(blocks, lambda block: self._texts.remove(block.block_id))

    def clear(self) -> None:
        """Forget all blocks."""
        self._texts.clear()


def _parent(request: Any, number: int) -> Parent:
    """The place of a block: a hash of all tokens before it and of the tenant, or the tenant alone.

    The server's requests have no LoRA and no images, which vLLM would hash, too.
    """
    return (request.block_hashes[number - 1],) if number else ("", request.cache_salt)


class _ShorterRequest:
    """A request as the prefix cache sees it, so that no wanted position is taken from the cache."""

    def __init__(self, request: Any, tokens: int) -> None:
        self._request = request
        self.num_tokens = tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def row_scheduler(*, vllm_config: Any, **kwargs: Any) -> Any:
    """Make vLLM's own scheduler, synchronous or asynchronous as configured, with rows."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    own = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    return type(f"Row{own.__name__}", (_RowScheduler, own), {})(vllm_config=vllm_config, **kwargs)


def missing_names() -> list[str]:
    """Names on which this module relies and that the installed vLLM lacks, as far as its classes show them."""
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    relied_on: dict[type, Collection[str]] = {
        Scheduler: ("update_from_output", "finish_requests", "reset_prefix_cache", "_free_request_blocks"),
        KVCacheManager: (
            "get_computed_blocks",
            "prefix_cache_lookup_enabled",
            "create_kv_cache_blocks",
            "take_kv_cache_block_copies",
        ),
        SingleTypeKVCacheManager: ("_has_partial_local_hit", "_apply_cow"),
        BlockPool: ("touch", "unpin_blocks"),
        Request: ("is_finished",),
        SchedulerOutput: ("kv_cache_block_copies",),
        EngineCoreOutput: ("routed_experts", "request_id", "finished"),
        ModelRunnerOutput: ("aux_output_connector_output",),
    }
    return [
        f"{owner.__name__}.{name}" for owner, names in relied_on.items() for name in names if not hasattr(owner, name)
    ]


def _is_first_tensor_rank() -> bool:
    from vllm.distributed.parallel_state import get_tp_group

    return bool(get_tp_group().is_first_rank)


def _with_rows(output: Any, packed_N_B: Tensor | None, spans: dict[str, Span], copy_stream: Callable[[], Any]) -> Any:
    """The runner's output with the rows of its pass, which an asynchronous output copies beside the GPU's work."""
    from vllm.v1.outputs import AsyncModelRunnerOutput

    if packed_N_B is None or output is None:
        return output
    if isinstance(output, AsyncModelRunnerOutput):
        return _asynchronous(output, packed_N_B, spans, copy_stream())
    output.aux_output_connector_output = {_OUTPUT: PassRows(packed_N_B.cpu().numpy(), spans)}
    return output


def _asynchronous(output: Any, packed_N_B: Tensor, spans: dict[str, Span], copy_stream: Any) -> Any:
    from vllm.v1.outputs import AsyncModelRunnerOutput

    class OutputWithRows(AsyncModelRunnerOutput):  # type: ignore[misc]
        """The runner's output, and rows on their way to the host."""

        def __init__(self) -> None:
            self._on_device: Tensor | None = packed_N_B  # not freed before it is copied
            self._on_host, self._copied = packed_N_B, None
            if packed_N_B.is_cuda:
                computing = torch.cuda.current_stream()
                self._copied = torch.cuda.Event(blocking=True)
                with torch.cuda.stream(copy_stream):
                    copy_stream.wait_stream(computing)
                    self._on_host = packed_N_B.to("cpu", non_blocking=True)
                    self._copied.record(copy_stream)

        def get_output(self) -> Any:
            result = output.get_output()
            if self._copied is not None:
                self._copied.synchronize()
            self._on_device = None
            result.aux_output_connector_output = {_OUTPUT: PassRows(self._on_host.numpy(), spans)}
            return result

    return OutputWithRows()

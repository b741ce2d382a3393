"""Rows of one forward pass of vLLM: which of its positions were requested, and which rows the scheduler accepts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plm_owner_server.engines.vllm.rows import SAMPLED, RowRequest, Rows, reduce_logits

# Logits (rows × V) in memory at once, of positions before the newest: 256 MiB in float32.
_MAX_LOGITS = 2**26

Span = tuple[int, int]
"""First position and number of the rows of one request in one pass."""


@dataclass
class RowSelection:
    """Requested rows of one forward pass, request by request.

    Attributes:
        indices: index of each row in the pass's flat hidden states.
        spans: the rows of each request, in the order of the rows.
        newest: row and index in the pass of each request whose newest position is scored by the sampler's logits.
        unsampled: places in `newest` of prompts that continue in the next pass, so that no token is sampled.
        earlier: rows that are scored and are not the newest of their request.
    """

    indices: list[int] = field(default_factory=list)
    spans: dict[str, Span] = field(default_factory=dict)
    newest: list[tuple[int, int]] = field(default_factory=list)
    unsampled: list[int] = field(default_factory=list)
    earlier: list[int] = field(default_factory=list)


def select_rows(
    names: Sequence[str],
    requests: Mapping[str, RowRequest],
    computed_B: np.ndarray[Any, Any],
    offsets_B: np.ndarray[Any, Any],
) -> RowSelection:
    """The requested rows of a pass.

    Args:
        names: name of each text in the pass.
        requests: requested rows, by name.
        computed_B: number of tokens of each text that were computed before the pass.
        offsets_B: begin of each text in the flat hidden states, and the end of the last.
    """
    selection = RowSelection()
    for i, name in enumerate(names):
        request = requests.get(name)
        if request is None:
            continue
        first, begin, end = int(computed_B[i]), int(offsets_B[i]), int(offsets_B[i + 1])
        start, stop = max(request.start, first), first + end - begin
        if start >= stop:
            continue
        row = len(selection.indices)
        selection.spans[name] = (start, stop - start)
        selection.indices.extend(range(begin + start - first, end))
        if request.scored_from is None or stop <= request.scored_from:
            continue
        if stop < request.prompt_tokens:
            selection.unsampled.append(len(selection.newest))
        selection.newest.append((row + stop - start - 1, i))
        selection.earlier.extend(range(row + max(request.scored_from, start) - start, row + stop - start - 1))
    return selection


def compute_rows(
    selection: RowSelection,
    hidden_T_D: Tensor,
    token_ids_T: Tensor,
    logits_B_V: Tensor | None,
    compute_logits: Callable[[Tensor], Tensor | None],
    vocab_size: int,
) -> Rows:
    """The selected rows, on the device of the hidden states. Must run on every rank of a tensor-parallel group.

    Args:
        selection: at least one row.
        hidden_T_D: hidden states of all tokens in the pass.
        token_ids_T: tokens of the pass.
        logits_B_V: the sampler's logits of each text's newest position; None on ranks that have none.
        compute_logits: logits [N, V] of hidden states [N, D]; None on ranks that have none.
        vocab_size: V.
    """
    device, count = hidden_T_D.device, len(selection.indices)
    indices_N = _to_device(selection.indices, device)
    hidden_N_D = hidden_T_D.index_select(0, indices_N)  # a copy, as the next pass may reuse the states' memory
    logsumexp_N, top1_logit_N = torch.full((2, count), torch.nan, device=device).unbind()
    top1_N = torch.full((count,), SAMPLED, dtype=torch.int32, device=device)

    def score(rows_M: Tensor, logits_M_V: Tensor) -> None:
        logsumexp_M, top_logit_M = reduce_logits(logits_M_V)
        logsumexp_N.index_copy_(0, rows_M, logsumexp_M)
        top1_logit_N.index_copy_(0, rows_M, top_logit_M)

    if selection.newest and logits_B_V is not None:
        rows, texts = (list(column) for column in zip(*selection.newest, strict=True))
        rows_M, is_all = _to_device(rows, device), texts == list(range(len(logits_B_V)))
        logits_M_V = logits_B_V if is_all else logits_B_V.index_select(0, _to_device(texts, device))
        score(rows_M, logits_M_V)
        if selection.unsampled:
            at = _to_device(selection.unsampled, device)
            top1_N.index_copy_(0, rows_M[at], logits_M_V.index_select(0, at).argmax(dim=-1).int())
    step = max(1, _MAX_LOGITS // vocab_size)  # equal on all ranks, as each call is one of all
    for begin in range(0, len(selection.earlier), step):
        rows_M = _to_device(selection.earlier[begin : begin + step], device)
        earlier_M_V = compute_logits(hidden_N_D.index_select(0, rows_M))
        if earlier_M_V is not None:
            score(rows_M, earlier_M_V)
            top1_N.index_copy_(0, rows_M, earlier_M_V.argmax(dim=-1).int())
    return Rows(hidden_N_D, logsumexp_N, top1_logit_N, top1_N, token_ids_T.index_select(0, indices_N).int())


def _to_device(numbers: list[int], device: torch.device) -> Tensor:
    host_N = torch.tensor(numbers, dtype=torch.int64)
    return host_N if device.type == "cpu" else host_N.pin_memory().to(device, non_blocking=True)


class RowLedger:
    """Accepted rows of all requests under way, each position once and in order. A finished request's are taken.

    A pass may compute positions again (after a preemption), or of tokens that the scheduler takes back. Their rows are
    told by their positions.
    """

    def __init__(self) -> None:
        self._rows: dict[str, list[np.ndarray[Any, Any]]] = {}
        self._next: dict[str, int] = {}

    def accept(self, name: str, request: RowRequest, span: Span, rows: np.ndarray[Any, Any], committed: int) -> None:
        """Accept of a pass's rows of one request those that are next.

        Args:
            name: name of the request.
            request: its requested rows.
            span: positions of the rows.
            rows: uint8 [N, bytes of a row].
            committed: number of its tokens that are known to be in the text, without the one sampled last.
        """
        first, count = span
        due, stop = self._next.get(name, request.start), min(first + count, committed)
        if first <= due < stop:
            # A copy, or a few rows would keep the memory of the whole pass.
            self._rows.setdefault(name, []).append(rows[due - first : stop - first].copy())
            self._next[name] = stop

    def take(self, name: str) -> np.ndarray[Any, Any] | None:
        """Remove and return all rows of a finished request, uint8 [N, bytes of a row]; None if there are none."""
        self._next.pop(name, None)
        rows = self._rows.pop(name, [])
        return np.concatenate(rows) if rows else None

    def keep_only(self, names: Collection[str]) -> None:
        """Remove the rows of all other requests: their clients have left."""
        for name in [name for name in self._next if name not in names]:
            self.take(name)

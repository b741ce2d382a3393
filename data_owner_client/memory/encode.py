"""Rows of pairs: the PLM encodes their contexts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TypeVar

import torch

from data_owner_client.data.label_tokens import LabelTokenizer
from data_owner_client.data.stops import StopMatcher
from data_owner_client.data.tasks import Task
from data_owner_client.memory.alignment import align
from data_owner_client.memory.request_batches import ExampleSizes, split_into_requests
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.memory.tokenized_pairs import TokenizedPair
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter
from protocol.errors import ProtocolViolation
from protocol.messages import DecodeResponse, EncodeResponse

_Response = TypeVar("_Response", EncodeResponse, DecodeResponse)


def encode_teacher_forced(plm: RemotePlm, pairs: Sequence[TokenizedPair], *, with_logsumexp: bool) -> MemoryRows:
    """Rows with the contexts c_i = prompt + y_<i. The server sees the targets except for their last token.

    Of redacted pairs it sees the targets with surrogates, and the contexts are the aligned ones of these.
    """
    response = plm.encode(
        [pair.prompt + pair.teacher_forced[:-1] for pair in pairs],
        [len(pair.prompt) - 1 for pair in pairs],
        with_logsumexp=with_logsumexp,
    )
    surrogates = [pair.surrogate for pair in pairs if pair.surrogate]
    if not surrogates:
        return _rows(response, pairs)
    indices = [[context.draft_index for context in each.contexts] for each in surrogates]
    contexts = [context for each in surrogates for context in each.contexts]
    return replace(
        _rows(_select_rows(response, [len(pair.teacher_forced) for pair in pairs], indices), pairs),
        # Each target has its own context already.
        context_N=torch.tensor([i for each in indices for i in range(len(each))], dtype=torch.int32),
        matches_N=torch.tensor([context.matches for context in contexts], dtype=torch.uint8),
        reliable_N=torch.tensor([context.reliable for context in contexts], dtype=torch.uint8),
    )


def encode_all(plm: RemotePlm, pairs: Sequence[TokenizedPair], reporter: Reporter) -> MemoryRows:
    """Teacher-forced rows with log-sum-exp, for pairs that need no memory on disk."""
    sizes = ExampleSizes()
    for pair in pairs:
        sizes.append(len(pair.prompt) + len(pair.teacher_forced), len(pair.teacher_forced))
    parts = []
    with reporter.bar("likelihood of targets", len(pairs), "pairs") as bar:
        for run in split_into_requests(sizes, plm.card, plm.dtype, done=0, examples_per_shard=len(pairs)):
            parts.append(encode_teacher_forced(plm, [pairs[i] for i in run], with_logsumexp=True))
            bar.advance(len(run))
    return MemoryRows.concatenate(parts)


def encode_private(
    plm: RemotePlm, pairs: Sequence[TokenizedPair], stops: StopMatcher, *, least_rows: int = 0
) -> MemoryRows:
    """Rows with the contexts c_i = prompt + ŵ_<i, where ŵ is the PLM's greedy continuation.

    The server sees only the prompts and, as `look_ahead`, the targets' lengths.

    Args:
        plm: the model.
        pairs: pairs as token ids.
        stops: finds the ends of continuations.
        least_rows: rows to request of each pair at least, to conceal the lengths of shorter targets.

    Raises:
        ProtocolViolation: the server drafted fewer tokens than requested.
    """
    requested = [rows_to_request(plm, pair, least_rows) for pair in pairs]
    response = plm.decode([pair.prompt for pair in pairs], [rows - 1 for rows in requested])
    lengths = [len(pair.target) for pair in pairs]
    if response.rows_B.tolist() != requested:
        raise ProtocolViolation(
            "The server drafted fewer tokens than were requested.", hint="Nothing was stored; try again."
        )
    response = _select_rows(response, requested, [range(length) for length in lengths])
    contexts = [
        context
        for drafted_T, pair in zip(response.top1_N.split(lengths), pairs, strict=True)
        for context in align(drafted_T.tolist(), pair.target, stops.end(drafted_T.tolist()))
    ]
    return replace(
        _rows(response, pairs),
        context_N=torch.tensor([context.draft_index for context in contexts], dtype=torch.int32),
        matches_N=torch.tensor([context.matches for context in contexts], dtype=torch.uint8),
        reliable_N=torch.tensor([context.reliable for context in contexts], dtype=torch.uint8),
    )


def _rows(response: EncodeResponse | DecodeResponse, pairs: Sequence[TokenizedPair]) -> MemoryRows:
    return MemoryRows(
        cr_N_D=response.cr_N_D,
        target_N=torch.tensor([i for pair in pairs for i in pair.target], dtype=torch.int32),
        rows_E=torch.tensor([len(pair.target) for pair in pairs], dtype=torch.int32),
        source_tokens_E=torch.tensor([pair.source_tokens for pair in pairs], dtype=torch.int32),
        logsumexp_N=response.logsumexp_N,
        last_hidden_N_D=response.last_hidden_N_D,
        cr_scale_N=response.cr_scale_N,
        last_hidden_scale_N=response.last_hidden_scale_N,
    )


def rows_to_request(plm: RemotePlm, pair: TokenizedPair, least_rows: int) -> int:
    """Rows that a private memory requests of a pair: one for each token of its target, or more to conceal its length.

    Args:
        plm: the model whose limits apply.
        pair: the pair as token ids.
        least_rows: rows to request at least, where the server's limits allow them.
    """
    limits = plm.card.limits
    most = min(limits.max_look_ahead + 1, limits.max_sequence_tokens - len(pair.prompt) + 1, limits.max_rows)
    return max(len(pair.target), min(least_rows, most))


def rows_that_conceal(plm: RemotePlm, task: Task) -> int:
    """Rows that a private memory requests of each pair at least: of a `classify` task, those of its longest label.

    Its labels are few, so the length of a label could tell which one it is. 0 for the other kinds of task.

    Raises:
        InvalidData: a label cannot be an answer of this task, or the model cannot tell two labels apart.
    """
    if task.kind != "classify":
        return 0
    return max(map(len, LabelTokenizer(plm.tokenizer, task.labels).check(task)))


def _select_rows(response: _Response, rows: Sequence[int], indices: Sequence[Sequence[int]]) -> _Response:
    """The response with some rows of each sequence.

    Args:
        response: rows of all sequences.
        rows: number of rows of each sequence.
        indices: indices of the selected rows of each sequence, from 0.
    """
    starts = [0, *accumulate(rows)]
    index_N = torch.tensor([at + k for at, each in zip(starts, indices, strict=False) for k in each])
    tensors = {
        name: value[index_N]
        for name, value in response
        if isinstance(value, torch.Tensor) and name.removesuffix("_D").endswith("_N")
    }
    return response.model_copy(update=tensors)

"""State of batches while they are drafted step by step: tokens, results by position, and the rule for the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from plm_owner_server.engines.interface import Decoded, DraftBatch

Columns = tuple[Tensor, ...]
"""Results of a pass, a row for each position: CR, log-sum-exp, top-1, its log-probability, and the head's input where
that is not the CR."""

ToIndex = Callable[[list[int]], Tensor]
"""Makes an int64 tensor of indices on the device of the columns."""


@dataclass(eq=False)
class DraftSequence:
    """One sequence of a batch.

    A sequence ends when it has all drafts that were requested, or after a stop token, which is its last top-1 and is
    not run.

    Attributes:
        state: the state of its batch.
        token_ids: the prompt and the drafts that were run or are run next.
        prompt_tokens: length of the prompt.
        start: first requested position.
        max_tokens: length of the prompt and all requested drafts.
        rows: for each position with a result, the index of the pass in its batch and the row in the pass's columns.
        is_finished: whether it has ended.
    """

    state: DraftState[Any]
    token_ids: list[int]
    prompt_tokens: int
    start: int
    max_tokens: int
    rows: list[tuple[int, int]] = field(default_factory=list, init=False)
    is_finished: bool = field(default=False, init=False)

    @property
    def next_position(self) -> int:
        """First requested position without a result."""
        return self.start + len(self.rows)

    @property
    def is_full(self) -> bool:
        """True if it has all requested drafts."""
        return len(self.token_ids) == self.max_tokens

    def accept(self, token: int) -> None:
        """Append the token that the last pass chose, or end the sequence."""
        self.is_finished = self.is_full or token in self.state.batch.stop_token_ids
        if not self.is_finished:
            self.token_ids.append(token)


DraftSequenceT = TypeVar("DraftSequenceT", bound=DraftSequence)


class DraftState(Generic[DraftSequenceT]):
    """A batch while it is drafted.

    Args:
        batch: the batch.
        sequence_type: class of its sequences.

    Attributes:
        batch: the batch.
        sequences: its sequences.
        passes: columns of each pass that it took part in, without rows of other batches.
    """

    def __init__(self, batch: DraftBatch, sequence_type: type[DraftSequenceT]) -> None:
        self.batch = batch
        self.passes: list[Columns] = []
        self.sequences = [
            sequence_type(self, list(ids), len(ids), start, len(ids) + look_ahead)
            for ids, start, look_ahead in zip(batch.token_ids, batch.from_position, batch.look_ahead, strict=True)
        ]

    @property
    def is_complete(self) -> bool:
        """True if all of its sequences have ended."""
        return all(sequence.is_finished for sequence in self.sequences)

    def columns(self, to_index: ToIndex = torch.tensor) -> list[Tensor]:
        """Results of all positions, sequence by sequence, on the device of the passes' columns."""
        offsets = [0, *accumulate(len(columns[0]) for columns in self.passes)]
        order_N = to_index([offsets[number] + row for sequence in self.sequences for number, row in sequence.rows])
        return [torch.cat(parts).index_select(0, order_N) for parts in zip(*self.passes, strict=True)]

    def decoded(self, columns: Sequence[Tensor], echo: list[int]) -> Decoded:
        """The result for the client.

        Args:
            columns: the result of `columns`, on the CPU.
            echo: CRC-32 of each prompt as the model received it.
        """
        cr_N_D, logsumexp_N, top1_N, top1_logprob_N, *last_hidden = columns
        return Decoded(
            rows=[len(sequence.rows) for sequence in self.sequences],
            echo=echo,
            cr_N_D=cr_N_D,
            last_hidden_N_D=last_hidden[0] if last_hidden else None,
            logsumexp_N=logsumexp_N,
            top1_N=top1_N,
            top1_logprob_N=top1_logprob_N,
        )


def record_pass(sequences: Sequence[DraftSequence], columns: Columns, to_index: ToIndex = torch.tensor) -> list[int]:
    """Record the results of one pass in the states of all batches that took part. Return each sequence's newest row.

    Args:
        sequences: sequences that took part.
        columns: results from each sequence's `next_position` to its last token, sequence by sequence.
        to_index: makes an index for the columns.
    """
    newest = []
    rows_of: dict[DraftState[Any], list[int]] = {}
    end = 0
    for sequence in sequences:
        rows = rows_of.setdefault(sequence.state, [])
        count = len(sequence.token_ids) - sequence.next_position
        sequence.rows += [(len(sequence.state.passes), len(rows) + i) for i in range(count)]
        rows += range(end, end + count)
        end += count
        newest.append(end - 1)
    for state, rows in rows_of.items():
        if len(rows_of) > 1:  # a batch must not hold the rows of others, which may end long before it
            index_N = to_index(rows)
            state.passes.append(tuple(column.index_select(0, index_N) for column in columns))
        else:
            state.passes.append(columns)
    return newest

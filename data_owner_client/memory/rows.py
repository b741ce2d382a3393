"""Rows of an external memory."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import safetensors.torch
import torch
from torch import Tensor

from protocol.quantization import dequantize

# Columns that belong to the contexts, not to the targets.
_CONTEXT_COLUMNS = ("cr_N_D", "cr_scale_N", "logsumexp_N", "last_hidden_N_D", "last_hidden_scale_N")
# Names in the shards of the columns that are called otherwise in code.
_STORED_NAMES = {"matches_N": "agrees_N", "reliable_N": "sure_N"}


@dataclass(frozen=True)
class MemoryRows:
    """Rows of a memory: N rows of E examples, one row for each target token.

    Attributes:
        cr_N_D: context representations f(c_i), in the memory's number format.
        target_N: int32 token ids y_i.
        rows_E: int32, number of rows of each example; the last row of an example is the stop.
        source_tokens_E: int32, length of each source text in tokens.
        logsumexp_N: float32, the PLM's log Σ_v exp(logit_v); None if it is not stored.
        last_hidden_N_D: the LM head's input, in the memory's number format; None if `cr_N_D` is that input.
        cr_scale_N: float32, factor of each row of `cr_N_D`; None unless `cr_N_D` is int8.
        last_hidden_scale_N: float32, factor of each row of `last_hidden_N_D`; None unless that is int8.
        context_N: int32, row of the same example, from 0, whose context is nearest to the true one of this row's target
            (`memory.alignment`). None if row i has the context of target i, as in teacher-forced memories.
        matches_N: uint8, 1 if that context ends as the true one does; None if all contexts are true. Stored as
            `agrees_N`.
        reliable_N: uint8, 1 if that match is no coincidence; always 1 in the first row of an example. None if all
            contexts are true. Stored as `sure_N`.
    """

    cr_N_D: Tensor
    target_N: Tensor
    rows_E: Tensor
    source_tokens_E: Tensor
    logsumexp_N: Tensor | None = None
    last_hidden_N_D: Tensor | None = None
    cr_scale_N: Tensor | None = None
    last_hidden_scale_N: Tensor | None = None
    context_N: Tensor | None = None
    matches_N: Tensor | None = None
    reliable_N: Tensor | None = None

    def position_N(self) -> Tensor:
        """Position t of each row in its target, int64, from 0."""
        return torch.arange(len(self.target_N)) - self._start_N()

    def aligned(self) -> MemoryRows:
        """Rows in which each target has the context nearest to its true one; unchanged if all contexts are true."""
        if self.context_N is None:
            return self
        index_N = self._start_N() + self.context_N.long()
        moved = {name: getattr(self, name) for name in _CONTEXT_COLUMNS if getattr(self, name) is not None}
        return replace(self, context_N=None, **{name: column[index_N] for name, column in moved.items()})

    def paired_by_position(self) -> MemoryRows:
        """Rows in which the k-th context stands for that of the k-th target token, as in the paper."""
        return replace(self, context_N=None, matches_N=None, reliable_N=None)

    def only_reliable_match(self) -> MemoryRows:
        """Rows in which only reliable contexts count as matches; unchanged if all contexts are true."""
        return self if self.reliable_N is None else replace(self, matches_N=self.reliable_N)

    def matching_rows(self) -> MemoryRows:
        """The rows whose contexts match. Their positions are no longer those in the targets."""
        if self.matches_N is None:
            return self
        mask_N = self.matches_N.bool()
        rows_E = [int(mask_T.sum()) for mask_T in mask_N.split(self.rows_E.tolist())]
        return self._select(mask_N, rows_E=torch.tensor(rows_E, dtype=torch.int32))

    def head(self, examples: int) -> MemoryRows:
        """The rows of the first `examples` examples."""
        rows_E = self.rows_E[:examples]
        rows = slice(int(rows_E.sum()))
        return self._select(rows, rows_E=rows_E, source_tokens_E=self.source_tokens_E[:examples])

    def _select(self, index: Tensor | slice, **example_columns: Tensor) -> MemoryRows:
        columns = {field.name: getattr(self, field.name) for field in fields(self) if not field.name.endswith("_E")}
        selected = {name: column[index] for name, column in columns.items() if column is not None}
        return replace(self, **selected, **example_columns)

    def _start_N(self) -> Tensor:
        starts_E = self.rows_E.long().cumsum(0) - self.rows_E.long()
        return starts_E.repeat_interleave(self.rows_E.long())

    def representations_N_D(self) -> Tensor:
        """Context representations f(c_i), as floats."""
        return dequantize(self.cr_N_D, self.cr_scale_N)

    def head_input_N_D(self) -> Tensor:
        """Inputs of the LM head that give P_PLM, as floats."""
        if self.last_hidden_N_D is None:
            return self.representations_N_D()
        return dequantize(self.last_hidden_N_D, self.last_hidden_scale_N)

    @classmethod
    def concatenate(cls, parts: list[MemoryRows]) -> Self:
        """Concatenate parts, in order. A column that one of them lacks is None."""
        columns: dict[str, Any] = {}
        for field in fields(cls):
            values = [getattr(part, field.name) for part in parts]
            columns[field.name] = None if any(value is None for value in values) else torch.cat(values)
        return cls(**columns)

    def to_bytes(self) -> bytes:
        """Serialise as a safetensors container."""
        columns = {_STORED_NAMES.get(field.name, field.name): getattr(self, field.name) for field in fields(self)}
        packed: bytes = safetensors.torch.save({k: v.contiguous() for k, v in columns.items() if v is not None})
        return packed

    @classmethod
    def from_columns(cls, columns: dict[str, Tensor]) -> Self:
        """Rows from the columns of a shard, under their stored names.

        Raises:
            ValueError: a column is missing, or its name is not a column of a memory.
        """
        names = {_STORED_NAMES.get(field.name, field.name): field.name for field in fields(cls)}
        try:
            return cls(**{names[stored]: column for stored, column in columns.items()})
        except (KeyError, TypeError) as error:
            raise ValueError("These are not the columns of a memory.") from error

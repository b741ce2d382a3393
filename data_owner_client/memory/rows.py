"""Rows of an external memory."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import safetensors.torch
import torch
from torch import Tensor

from protocol.quantization import dequantize

# Columns that belong to the contexts, not to the targets.
_OF_CONTEXTS = ("cr_N_D", "cr_scale_N", "logsumexp_N", "last_hidden_N_D", "last_hidden_scale_N")


@dataclass(frozen=True)
class MemoryRows:
    """Rows of a memory: N rows of E examples, one row for each target token.

    Attributes:
        cr_N_D: context representations f(c_i), in the memory's number format.
        target_N: int32 token ids y_i.
        rows_E: int32, rows of each example; the last of them is the stop.
        source_tokens_E: int32, length of each source text in tokens.
        logsumexp_N: float32, the PLM's log Σ_v exp(logit_v), where the memory has it.
        last_hidden_N_D: the LM head's input, where `cr_N_D` is something else.
        cr_scale_N: float32, what each row of `cr_N_D` is to be multiplied by, where that is int8.
        last_hidden_scale_N: the same of `last_hidden_N_D`.
        context_N: int32, in private memories the row of the same example, counted from 0, whose context comes nearest
            to the true one of this row's target (`memory.alignment`).
        agrees_N: uint8, whether that context ends as the true one does.
        sure_N: uint8, whether that is no coincidence; always so in the first row of an example.
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
    agrees_N: Tensor | None = None
    sure_N: Tensor | None = None

    def position_N(self) -> Tensor:
        """int64 position t of each row in its target, from 0."""
        return torch.arange(len(self.target_N)) - self._start_N()

    def aligned(self) -> MemoryRows:
        """The same targets, each with the context that comes nearest to its true one; as it is if all are true."""
        if self.context_N is None:
            return self
        index_N = self._start_N() + self.context_N.long()
        moved = {name: getattr(self, name) for name in _OF_CONTEXTS if getattr(self, name) is not None}
        return replace(self, context_N=None, **{name: column[index_N] for name, column in moved.items()})

    def by_position(self) -> MemoryRows:
        """The same without what is known of other pairings: the k-th context stands for that of the k-th token."""
        return replace(self, context_N=None, agrees_N=None, sure_N=None)

    def strict(self) -> MemoryRows:
        """The same, said to agree only where the contexts are sure to; as it is if all are true."""
        return self if self.sure_N is None else replace(self, agrees_N=self.sure_N)

    def agreeing(self) -> MemoryRows:
        """The rows whose contexts agree without the others, so that positions are no longer those in the targets."""
        if self.agrees_N is None:
            return self
        kept_N = self.agrees_N.bool()
        rows_E = [int(kept_T.sum()) for kept_T in kept_N.split(self.rows_E.tolist())]
        return self._of_rows(kept_N, rows_E=torch.tensor(rows_E, dtype=torch.int32))

    def first(self, examples: int) -> MemoryRows:
        """The rows of the first so many examples."""
        rows_E = self.rows_E[:examples]
        rows = slice(int(rows_E.sum()))
        return self._of_rows(rows, rows_E=rows_E, source_tokens_E=self.source_tokens_E[:examples])

    def _of_rows(self, index: Tensor | slice, **of_examples: Tensor) -> MemoryRows:
        columns = {field.name: getattr(self, field.name) for field in fields(self) if not field.name.endswith("_E")}
        kept = {name: column[index] for name, column in columns.items() if column is not None}
        return replace(self, **kept, **of_examples)

    def _start_N(self) -> Tensor:
        starts_E = self.rows_E.long().cumsum(0) - self.rows_E.long()
        return starts_E.repeat_interleave(self.rows_E.long())

    def representations_N_D(self) -> Tensor:
        """f(c_i) as floats."""
        return dequantize(self.cr_N_D, self.cr_scale_N)

    def head_input_N_D(self) -> Tensor:
        """What the LM head is applied to for P_PLM, as floats."""
        if self.last_hidden_N_D is None:
            return self.representations_N_D()
        return dequantize(self.last_hidden_N_D, self.last_hidden_scale_N)

    @classmethod
    def concatenate(cls, parts: list[MemoryRows]) -> Self:
        """Rows of several parts, in their order."""
        columns: dict[str, Any] = {}
        for field in fields(cls):
            values = [getattr(part, field.name) for part in parts]
            columns[field.name] = None if any(value is None for value in values) else torch.cat(values)
        return cls(**columns)

    def to_bytes(self) -> bytes:
        """As a safetensors container."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        packed: bytes = safetensors.torch.save({k: v.contiguous() for k, v in columns.items() if v is not None})
        return packed

"""Putting the results of several batches back together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, NoReturn, TypeVar

import torch
from torch import Tensor

from plm_owner_server.engines.interface import Encoded
from protocol.errors import ServerFault

Batch = TypeVar("Batch", bound=Encoded)


class UnbatchedRows(Generic[Batch]):
    """Results of several batches, put back into the order of the request's sequences.

    Attributes:
        echo: of each sequence.
        rows_B: int64, rows of each sequence.

    Raises:
        ServerFault: a sequence was not answered exactly once.
    """

    def __init__(self, plan: list[list[int]], results: Sequence[Batch], sequences: int) -> None:
        self._results = results
        order = [index for batch in plan for index in batch]
        rows = [count for result in results for count in result.rows]
        if sorted(order) != list(range(sequences)) or len(rows) != sequences:
            _not_all_answered()
        place = sorted(range(sequences), key=order.__getitem__)
        echo = [value for result in results for value in result.echo]
        self.echo = [echo[i] for i in place]
        self.rows_B = torch.tensor([rows[i] for i in place])
        starts = torch.tensor([0, *rows]).cumsum(0)
        spans = [torch.arange(int(starts[i]), int(starts[i]) + rows[i]) for i in place]
        self._order_N = torch.cat(spans)

    def rows(self, part: Callable[[Batch], Tensor]) -> Tensor:
        """One column of the results, [N, …], in the order of the sequences."""
        gathered = torch.cat([part(result) for result in self._results])
        if len(gathered) != len(self._order_N):
            _not_all_answered()
        return gathered[self._order_N]

    def optional_rows(self, part: Callable[[Batch], Tensor | None]) -> Tensor | None:
        """The same for a column that may be missing."""
        if part(self._results[0]) is None:
            return None
        return self.rows(lambda result: required(part(result)))


def required(value: Tensor | None) -> Tensor:
    """The value, which an engine owes.

    Raises:
        ServerFault: it is missing.
    """
    if value is None:
        _not_all_answered()
    return value


def _not_all_answered() -> NoReturn:
    raise ServerFault(
        "The engine did not answer every position that was asked for.", hint="Report this to the owner; try again."
    )

"""Merging of the results of several batches into one result in the order of the request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from plm_owner_server.engines.interface import Encoded
from protocol.errors import ServerFault

Result = TypeVar("Result", bound=Encoded)


def unbatch(plan: Sequence[Sequence[int]], results: Sequence[Result]) -> Result:
    """One result with the rows of all sequences, in the order of the sequences.

    Args:
        plan: indices of the sequences in each batch; together each index from 0 to B - 1 once.
        results: result of each batch.

    Raises:
        ServerFault: the engine did not answer every sequence and every position exactly once.
    """
    order = [index for batch in plan for index in batch]
    rows = [count for result in results for count in result.rows]
    if len(results) != len(plan) or len(rows) != len(order):
        _not_all_answered()
    flat_position = sorted(range(len(order)), key=order.__getitem__)
    echo = [value for result in results for value in result.echo]
    starts = torch.tensor([0, *rows]).cumsum(0)
    order_N = torch.cat([torch.arange(int(starts[i]), int(starts[i]) + rows[i]) for i in flat_position])
    columns = {
        column.name: _column(column.name, results, len(order_N))[order_N]
        for column in fields(results[0])
        if isinstance(getattr(results[0], column.name), Tensor)
    }
    return replace(results[0], rows=[rows[i] for i in flat_position], echo=[echo[i] for i in flat_position], **columns)


def _column(name: str, results: Sequence[Encoded], rows: int) -> Tensor:
    """One column of all results, [N, …], in the order of the batches."""
    column = torch.cat([required(getattr(result, name)) for result in results])
    if len(column) != rows:
        _not_all_answered()
    return column


def required(value: Tensor | None) -> Tensor:
    """The value, which the engine must return.

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

"""Large answers in chunks that fit a gRPC message, each of whole sequences or whole head rows, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from protocol.errors import ProtocolViolation
from protocol.messages import DecodeResponse, EncodeResponse, HeadRows

CHUNK_BYTES = 2**20
"""Approximate bytes of tensors in one chunk, far below gRPC's default limit of 4 MiB for a message."""

_MISFIT = "The pieces of an answer do not fit together."
_Rows = TypeVar("_Rows", EncodeResponse, DecodeResponse)


def split_rows(response: _Rows, chunk_bytes: int = CHUNK_BYTES) -> Iterator[_Rows]:
    """Split an answer into chunks of whole sequences: at least one, and as many as fit."""
    rows = response.rows_B.tolist()
    columns = _row_columns(response)
    row_bytes = sum(column[:1].nbytes for column in columns.values())
    first = start = 0
    while first < len(rows):
        last, stop = first + 1, start + rows[first]
        while last < len(rows) and (stop + rows[last] - start) * row_bytes <= chunk_bytes:
            stop += rows[last]
            last += 1
        part = {name: column[start:stop] for name, column in columns.items()}
        yield response.model_copy(
            update={"echo": response.echo[first:last], "rows_B": response.rows_B[first:last]} | part
        )
        first, start = last, stop


def join_rows(chunks: Sequence[_Rows]) -> _Rows:
    """Join the chunks of an answer.

    Raises:
        ProtocolViolation: the chunks differ in their columns or digests.
    """
    first = chunks[0]
    columns = [_row_columns(chunk) for chunk in chunks]
    if any(part.keys() != columns[0].keys() for part in columns) or len({chunk.digest for chunk in chunks}) > 1:
        raise ProtocolViolation(_MISFIT, hint="Nothing was stored; try again.")
    joined: dict[str, object] = {name: torch.cat([part[name] for part in columns]) for name in columns[0]}
    joined["rows_B"] = torch.cat([chunk.rows_B for chunk in chunks])
    joined["echo"] = [value for chunk in chunks for value in chunk.echo]
    return first.model_copy(update=joined)


def split_head(rows: HeadRows, chunk_bytes: int = CHUNK_BYTES) -> Iterator[HeadRows]:
    """Split head rows into chunks of whole rows."""
    step = max(1, chunk_bytes // max(1, rows.weight_N_D[:1].nbytes))
    for start in range(0, len(rows.weight_N_D), step):
        bias_N = None if rows.bias_N is None else rows.bias_N[start : start + step]
        yield rows.model_copy(update={"weight_N_D": rows.weight_N_D[start : start + step], "bias_N": bias_N})


def join_head(chunks: Sequence[HeadRows]) -> HeadRows:
    """Join the chunks of head rows.

    Raises:
        ProtocolViolation: the chunks differ in their digests.
    """
    if len({chunk.digest for chunk in chunks}) > 1:
        raise ProtocolViolation(_MISFIT, hint="Nothing was stored; try again.")
    biases = [chunk.bias_N for chunk in chunks if chunk.bias_N is not None]
    return chunks[0].model_copy(
        update={
            "weight_N_D": torch.cat([chunk.weight_N_D for chunk in chunks]),
            "bias_N": torch.cat(biases) if biases else None,
        }
    )


def _row_columns(response: EncodeResponse | DecodeResponse) -> dict[str, Tensor]:
    return {
        name: value
        for name in type(response).model_fields
        if name != "rows_B" and isinstance(value := getattr(response, name), Tensor)
    }

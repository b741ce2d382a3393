"""Answers in pieces that fit a message: rows of whole sequences, in their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from protocol.errors import ProtocolViolation
from protocol.messages import DecodeResponse, EncodeResponse, HeadRows

PIECE_BYTES = 2**20
"""Bytes of tensors in one piece, more or less: far below gRPC's default limit of 4 MiB for a message."""

_Rows = TypeVar("_Rows", EncodeResponse, DecodeResponse)


def split_rows(response: _Rows, piece_bytes: int = PIECE_BYTES) -> Iterator[_Rows]:
    """Pieces of an answer, each of whole sequences: at least one, and more as long as they fit."""
    rows = response.rows_B.tolist()
    columns = _row_columns(response)
    row_bytes = sum(column[:1].nbytes for column in columns.values())
    first = start = 0
    while first < len(rows):
        last, stop = first + 1, start + rows[first]
        while last < len(rows) and (stop + rows[last] - start) * row_bytes <= piece_bytes:
            stop += rows[last]
            last += 1
        part = {name: column[start:stop] for name, column in columns.items()}
        yield response.model_copy(
            update={"echo": response.echo[first:last], "rows_B": response.rows_B[first:last]} | part
        )
        first, start = last, stop


def join_rows(pieces: Sequence[_Rows]) -> _Rows:
    """The answer that pieces are of.

    Raises:
        ProtocolViolation: they do not fit together.
    """
    first = pieces[0]
    columns = [_row_columns(piece) for piece in pieces]
    if any(part.keys() != columns[0].keys() for part in columns) or len({piece.digest for piece in pieces}) > 1:
        raise ProtocolViolation("The pieces of an answer do not fit together.", hint="Nothing was stored; try again.")
    joined: dict[str, object] = {name: torch.cat([part[name] for part in columns]) for name in columns[0]}
    joined["rows_B"] = torch.cat([piece.rows_B for piece in pieces])
    joined["echo"] = [value for piece in pieces for value in piece.echo]
    return first.model_copy(update=joined)


def split_head(rows: HeadRows, piece_bytes: int = PIECE_BYTES) -> Iterator[HeadRows]:
    """Pieces of head rows, each of whole rows."""
    step = max(1, piece_bytes // max(1, rows.weight_N_D[:1].nbytes))
    for start in range(0, len(rows.weight_N_D), step):
        bias_N = None if rows.bias_N is None else rows.bias_N[start : start + step]
        yield rows.model_copy(update={"weight_N_D": rows.weight_N_D[start : start + step], "bias_N": bias_N})


def join_head(pieces: Sequence[HeadRows]) -> HeadRows:
    """The head rows that pieces are of."""
    biases = [piece.bias_N for piece in pieces if piece.bias_N is not None]
    return pieces[0].model_copy(
        update={
            "weight_N_D": torch.cat([piece.weight_N_D for piece in pieces]),
            "bias_N": torch.cat(biases) if biases else None,
        }
    )


def _row_columns(response: EncodeResponse | DecodeResponse) -> dict[str, Tensor]:
    return {
        name: value
        for name in type(response).model_fields
        if name != "rows_B" and isinstance(value := getattr(response, name), Tensor)
    }

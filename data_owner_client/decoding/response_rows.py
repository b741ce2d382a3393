"""Rows of a response: some of them, and those of two responses together."""

from __future__ import annotations

from torch import Tensor

from protocol.messages import DecodeResponse

_ROW_FIELDS = (
    *("cr_N_D", "cr_scale_N", "last_hidden_N_D", "last_hidden_scale_N"),
    *("logsumexp_N", "top1_N", "top1_logprob_N"),
)


def rows_at(response: DecodeResponse, index_N: Tensor) -> DecodeResponse:
    """The response with only these rows, int64 [N]; its counts of rows stay as they are."""
    return response.model_copy(update={name: value[index_N] for name, value in row_values(response).items()})


def row_values(response: DecodeResponse) -> dict[str, Tensor]:
    """The fields of a response that have a value for each row, by name."""
    values = {name: getattr(response, name) for name in _ROW_FIELDS}
    return {name: value for name, value in values.items() if value is not None}


def row_bytes(response: DecodeResponse) -> int:
    """Bytes of all rows of a response."""
    return sum(value.nbytes for value in row_values(response).values())


def with_representations(response: DecodeResponse, is_other_N: Tensor, other: DecodeResponse) -> DecodeResponse:
    """The response with the representations of another one in some rows.

    Args:
        response: the response.
        is_other_N: True for each row that the other response has, bool.
        other: the response with these rows alone.
    """
    mixed = {"cr_N_D": response.cr_N_D.clone()}
    mixed["cr_N_D"][is_other_N] = other.cr_N_D
    if response.cr_scale_N is not None and other.cr_scale_N is not None:
        mixed["cr_scale_N"] = response.cr_scale_N.clone()
        mixed["cr_scale_N"][is_other_N] = other.cr_scale_N
    return response.model_copy(update=mixed)

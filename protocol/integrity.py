"""Checks that both sides of the wire make on the same values."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from protocol.errors import NumericalFault

TokenIds = Sequence[int]

# Longest field name that an error repeats, in characters.
_MAX_NAME_LENGTH = 40


def token_crc32(token_ids: TokenIds) -> int:
    """CRC-32 over a sequence's token ids as little-endian int32; the field `echo` of messages.

    The client sends it, and the server compares it with the ids that arrived. The engine computes it again from the ids
    that it ran, and the client compares that. So no row can be attributed to another sequence unnoticed.
    """
    return zlib.crc32(struct.pack(f"<{len(token_ids)}i", *token_ids))


def token_crc32s(sequences: Iterable[TokenIds]) -> list[int]:
    """`token_crc32` of every sequence."""
    return [token_crc32(token_ids) for token_ids in sequences]


def require_finite(values: Tensor, what: str) -> None:
    """Check that all values are finite.

    Args:
        values: any shape, any float dtype.
        what: name of the values for the error.

    Raises:
        NumericalFault: some are not; the error counts them.
    """
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise NumericalFault(
            f"{bad} of {values.numel()} values of {what} are not finite.",
            hint="If they overflowed float16 on the wire, ask for float32; otherwise the model itself produced them.",
        )


def error_path(parts: Sequence[str | int]) -> str:
    """Path of an error in a message, from pydantic's `loc`. Parts that may be private text are not repeated."""
    labels = [str(part) if isinstance(part, int) or _is_field_name(part) else "an unknown field" for part in parts]
    return ".".join(labels) or "body"


def _is_field_name(text: str) -> bool:
    return text.isascii() and text.isidentifier() and len(text) <= _MAX_NAME_LENGTH

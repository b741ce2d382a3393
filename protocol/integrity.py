"""Checks that both sides of the wire make on the same values."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from protocol.errors import NumericalFault

TokenIds = Sequence[int]

# Of a field, in characters.
_LONGEST_NAME = 40


def echo(token_ids: TokenIds) -> int:
    """CRC-32 over a sequence's token ids as little-endian int32.

    The client sends it, the server compares it with what arrived, the engine computes it again from the ids that it
    really ran, and the client compares that: no row can be attributed to another sequence unnoticed.
    """
    return zlib.crc32(struct.pack(f"<{len(token_ids)}i", *token_ids))


def echoes(sequences: Iterable[TokenIds]) -> list[int]:
    """`echo` of every sequence."""
    return [echo(token_ids) for token_ids in sequences]


def require_finite(values: Tensor, what: str) -> None:
    """Raise `NumericalFault` with counts if any value is not finite."""
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise NumericalFault(
            f"{bad} of {values.numel()} values of {what} are not finite.",
            hint="If they overflowed float16 on the wire, ask for float32; otherwise the model itself produced them.",
        )


def error_path(parts: Sequence[str | int]) -> str:
    """Where in a message something is wrong, as pydantic's `loc` says; what may be a text is not told."""
    shown = [str(part) if isinstance(part, int) or _is_a_name(part) else "an unknown field" for part in parts]
    return ".".join(shown) or "body"


def _is_a_name(text: str) -> bool:
    return text.isascii() and text.isidentifier() and len(text) <= _LONGEST_NAME

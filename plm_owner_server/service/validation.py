"""Checks of requests that several calls share."""

from __future__ import annotations

from collections.abc import Sequence

from protocol.errors import InvalidRequest


def check_vocabulary(sequences: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Check that all token ids are in the vocabulary.

    Raises:
        InvalidRequest: a token id lies outside the vocabulary.
    """
    top = max((max(ids) for ids in sequences if ids), default=0)
    if top >= vocab_size:
        raise InvalidRequest(
            "A token id lies outside the vocabulary.",
            hint=f"Ids are 0 to {vocab_size - 1}; tokenise with this server's own tokenizer.",
        )

"""Literal types of the wire. Kept free of torch, so that command lines can name their choices at once."""

from __future__ import annotations

from typing import Literal

CrKind = Literal["last_hidden_state", "ffn_output"]
"""Representation that the server gives: the LM head's input, or the last feed-forward output."""
HeadDtype = Literal["float16", "bfloat16", "float32"]
"""Number format of LM head rows on the wire."""
HeadPolicy = Literal["full", "candidate", "none"]
"""LM head rows that a client may have: all, those of chosen tokens, or none."""
WireDtype = Literal["float16", "bfloat16", "float32", "int8"]
"""Number format of representations on the wire."""

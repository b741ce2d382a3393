"""Scopes of a tenant. Kept free of the database, so that the command line can name them at once."""

from __future__ import annotations

from typing import Literal, get_args

Scope = Literal["card", "head", "encode", "decode", "distribution"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""Calls that a tenant may be allowed: card and tokenizer, rows of the LM head, and the calls of these names."""

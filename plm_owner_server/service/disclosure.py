"""What a tenant may see of the model. Who keeps it needs no model; `views.py` makes of it what is seen."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.types import HeadPolicy


@dataclass(frozen=True)
class Disclosure:
    """What a tenant may see of the model.

    Attributes:
        head_policy: which rows of the LM head.
        rotated: representations and rows come in a secret basis of its own.
    """

    head_policy: HeadPolicy = "full"
    rotated: bool = False


FULL_DISCLOSURE = Disclosure()
"""All of the LM head, in the model's own basis."""

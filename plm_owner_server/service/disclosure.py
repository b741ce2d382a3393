"""A tenant's disclosure: the parts of the model that it may see.

Free of model code, because the tenant store imports it. `disclosed_model.py` applies it.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.types import HeadPolicy


@dataclass(frozen=True)
class Disclosure:
    """The parts of the model that a tenant may see.

    Attributes:
        head_policy: rows of the LM head that the tenant may have.
        rotated: True if representations and rows come in the tenant's secret basis.
    """

    head_policy: HeadPolicy = "full"
    rotated: bool = False


FULL_DISCLOSURE = Disclosure()
"""The whole LM head, in the model's own basis."""

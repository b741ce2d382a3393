"""Identity of the served model, which is stamped into every memory and adapter."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from protocol.errors import IdentityMismatch
from protocol.messages import ModelCard
from protocol.types import CrKind


class ModelIdentity(BaseModel):
    """The model that a memory or an adapter belongs to."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: str
    digest: str
    cr_kind: CrKind
    hidden_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)

    @classmethod
    def from_card(cls, card: ModelCard) -> Self:
        """The identity in a model card."""
        return cls(**{name: getattr(card, name) for name in cls.model_fields})

    def require(self, other: ModelIdentity, what: str, other_what: str) -> None:
        """Refuse to use two things of different models together.

        Raises:
            IdentityMismatch: they differ; the message names both.
        """
        if self.digest != other.digest:
            raise IdentityMismatch(
                f"{what} belongs to {self.name} ({self.digest[:12]}, {self.cr_kind}), but {other_what} to {other.name} "
                f"({other.digest[:12]}, {other.cr_kind}).",
                hint="Use the server that it was made with, or build and train again for this one.",
            )

"""Identity of the served model, which every memory and adapter stores."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from protocol.errors import IdentityMismatch
from protocol.messages import ModelCard
from protocol.types import CrKind


class ModelIdentity(BaseModel):
    """The model that a memory or an adapter belongs to.

    Attributes:
        name: name of the model.
        digest: digest of the model's weights and of all that changes its answers.
        cr_kind: kind of the context representations.
        hidden_size: D.
        vocab_size: V.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: str
    digest: str
    cr_kind: CrKind
    hidden_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)

    @classmethod
    def from_card(cls, card: ModelCard) -> Self:
        """The identity of the model with this card."""
        return cls(**{name: getattr(card, name) for name in cls.model_fields})

    def require(self, other: ModelIdentity, label: str, other_label: str) -> None:
        """Refuse to combine two things that belong to different models.

        Args:
            other: identity of the second model.
            label: name of the thing that belongs to this model, for the message.
            other_label: name of the thing that belongs to the other model, for the message.

        Raises:
            IdentityMismatch: the models differ; the message names both.
        """
        if self.digest != other.digest:
            raise IdentityMismatch(
                f"{label} belongs to {self.name} ({self.digest[:12]}, {self.cr_kind}), but {other_label} to "
                f"{other.name} ({other.digest[:12]}, {other.cr_kind}).",
                hint="Use the server and the key that it was made with, or build and train again for these.",
            )

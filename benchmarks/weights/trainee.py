"""The model that a system trains, and the models that come of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

_BYTES_OF_A_WEIGHT = 2  # weights travel in half precision


@dataclass(frozen=True)
class Outcome:
    """A model to evaluate.

    Attributes:
        what: description of the system.
        model: makes the model when training has ended.
        client_discloses: bytes that the data owner shows the owner; None where one party has both model and texts.
        owner_discloses: bytes that the owner shows the data owner; None where one party has both model and texts.
    """

    what: str
    model: Callable[[], PreTrainedModel]
    client_discloses: int | None = None
    owner_discloses: int | None = None


@dataclass(frozen=True)
class Trainee:
    """A model whose weights that require gradients are to be trained.

    Attributes:
        model: the model.
        rates: learning rates to try.
        outcomes: the models that come of it, by name of the system.
        details: settings of the system.
    """

    model: PreTrainedModel
    rates: Sequence[float]
    outcomes: dict[str, Outcome]
    details: dict[str, Any] = field(default_factory=dict)


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of all weights of the modules in half precision, each weight counted once."""
    weights = {weight for module in modules for weight in module.parameters()}
    return sum(weight.numel() for weight in weights) * _BYTES_OF_A_WEIGHT

"""Training: a memory and a head in, an adapter out."""

from data_owner_client.training.loop import Epoch, Trained, train_adapter
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.stream import Batch, Sharded, Survey
from data_owner_client.training.validation import (
    ValidationData,
    choose_interpolation,
    target_logprobs,
)

__all__ = [
    "Batch",
    "Epoch",
    "Sharded",
    "Survey",
    "Trained",
    "TrainingSettings",
    "ValidationData",
    "choose_interpolation",
    "target_logprobs",
    "train_adapter",
]

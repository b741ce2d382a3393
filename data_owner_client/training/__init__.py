"""Training: a memory and a head in, an adapter out."""

from data_owner_client.training.loop import Epoch, Trained, train_adapter
from data_owner_client.training.settings import Pairing, TrainingSettings
from data_owner_client.training.stream import Batch, FirstExamples, Sharded, Sure, Survey, Viewed
from data_owner_client.training.tuning import tune
from data_owner_client.training.validation import (
    ValidationData,
    likeliest_interpolations,
    target_logprobs,
)

__all__ = [
    "Batch",
    "Epoch",
    "FirstExamples",
    "Pairing",
    "Sharded",
    "Sure",
    "Survey",
    "Trained",
    "TrainingSettings",
    "ValidationData",
    "Viewed",
    "likeliest_interpolations",
    "target_logprobs",
    "train_adapter",
    "tune",
]

"""The data owner's side of PEMA: adapt somebody else's language model without showing them your adapter or gradients.

The verbs of `pema-client` as functions:

    from data_owner_client import build_memories, connect, load_task, read_pairs, train, translate
"""

from data_owner_client.adapter import TrainedAdapter
from data_owner_client.data import Pair, read_pairs, read_parallel
from data_owner_client.decoding.interpolation import Interpolation
from data_owner_client.decoding.rounds import DecodingSettings
from data_owner_client.generation import Generation, generate, translate
from data_owner_client.memory import ExternalMemory
from data_owner_client.plm import RemotePlm
from data_owner_client.tasks import Task, load_task
from data_owner_client.training import TrainingSettings
from data_owner_client.verbs import (
    Evaluation,
    MemoryReport,
    TrainingReport,
    build_memories,
    connect,
    evaluate,
    train,
)

__all__ = [
    "DecodingSettings",
    "Evaluation",
    "ExternalMemory",
    "Generation",
    "Interpolation",
    "MemoryReport",
    "Pair",
    "RemotePlm",
    "Task",
    "TrainedAdapter",
    "TrainingReport",
    "TrainingSettings",
    "build_memories",
    "connect",
    "evaluate",
    "generate",
    "load_task",
    "read_pairs",
    "read_parallel",
    "train",
    "translate",
]

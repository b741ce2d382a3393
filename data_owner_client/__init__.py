"""The data owner's side of PEMA: adapt somebody else's language model without showing them your adapter or gradients.

The verbs of `pema-client` as functions:

    from data_owner_client import build_memories, connect, load_task, read_pairs, train, translate
"""

from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.data.pairs import Pair, read_pairs, read_parallel
from data_owner_client.data.tasks import Task, load_task
from data_owner_client.decoding.generation import Generation, generate, translate
from data_owner_client.decoding.speculative import DecodingSettings
from data_owner_client.evaluation.evaluate import Evaluation, evaluate
from data_owner_client.memory.build_splits import MemoryReport, build_memories
from data_owner_client.memory.store import ExternalMemory
from data_owner_client.plm.connect import connect
from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.train import TrainingReport, train

__all__ = [
    "DecodingSettings",
    "Evaluation",
    "ExternalMemory",
    "Generation",
    "InProcessConnection",
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

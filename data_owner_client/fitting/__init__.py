"""Training as a user asks for it: memories and a server in; an adapter, and what was chosen for it, out."""

from data_owner_client.fitting.inputs import Memories, TrainingInput, suited
from data_owner_client.fitting.train import REPORT, TrainingReport, Trial, train
from data_owner_client.fitting.usage import NEAREST, Option

__all__ = [
    "NEAREST",
    "REPORT",
    "Memories",
    "Option",
    "TrainingInput",
    "TrainingReport",
    "Trial",
    "suited",
    "train",
]

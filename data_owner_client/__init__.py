"""The data owner's side of PEMA: adapt somebody else's language model without showing them your adapter or gradients.

The verbs of `pema-client` as functions:

    from data_owner_client import build_memories, connect, load_task, read_pairs, train, translate
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_owner_client.adapter.interpolation import Interpolation
    from data_owner_client.adapter.trained import TrainedAdapter
    from data_owner_client.data.answer_form import AnswerForm
    from data_owner_client.data.pairs import Conversation, Pair
    from data_owner_client.data.reading.reader import read_pairs, read_parallel, spool_pairs
    from data_owner_client.data.reading.settings import ReadingSettings
    from data_owner_client.data.redaction.rules import Redaction, RedactionRules, load_redaction
    from data_owner_client.data.tasks import Task, load_task
    from data_owner_client.decoding.generation import Generation, generate, translate
    from data_owner_client.decoding.settings import DecodingSettings, SamplingSettings
    from data_owner_client.evaluation.evaluate import Evaluation, evaluate
    from data_owner_client.memory.build_splits import MemoryReport, build_memories
    from data_owner_client.memory.store import ExternalMemory
    from data_owner_client.plm.connect import connect
    from data_owner_client.plm.connection.in_process import InProcessConnection
    from data_owner_client.plm.connection.settings import ConnectionSettings
    from data_owner_client.plm.remote_plm import RemotePlm
    from data_owner_client.scoring.settings import ScoringSettings
    from data_owner_client.training.settings import TrainingSettings
    from data_owner_client.training.train import TrainingReport, train
    from protocol.errors import (
        AnswerLost,
        BudgetExhausted,
        ConnectionFailed,
        Forbidden,
        GatewayFailed,
        GatewayTimeout,
        IdentityMismatch,
        InvalidData,
        InvalidRequest,
        MalformedMessage,
        Misdirected,
        NotAcceptable,
        NotReady,
        NumericalFault,
        OverLimit,
        Overloaded,
        PayloadTooLarge,
        PemaError,
        ProtocolViolation,
        QuotaExceeded,
        RequestTimeout,
        ServerFault,
        TimedOut,
        Unauthenticated,
        Unsupported,
        UnsupportedMediaType,
        Untrusted,
    )

# Modules are imported when a name of theirs is used: torch alone takes seconds.
_HOMES = {
    "AnswerForm": "data_owner_client.data.answer_form",
    "AnswerLost": "protocol.errors",
    "BudgetExhausted": "protocol.errors",
    "ConnectionFailed": "protocol.errors",
    "ConnectionSettings": "data_owner_client.plm.connection.settings",
    "Conversation": "data_owner_client.data.pairs",
    "DecodingSettings": "data_owner_client.decoding.settings",
    "Evaluation": "data_owner_client.evaluation.evaluate",
    "ExternalMemory": "data_owner_client.memory.store",
    "Forbidden": "protocol.errors",
    "GatewayFailed": "protocol.errors",
    "GatewayTimeout": "protocol.errors",
    "Generation": "data_owner_client.decoding.generation",
    "IdentityMismatch": "protocol.errors",
    "InProcessConnection": "data_owner_client.plm.connection.in_process",
    "Interpolation": "data_owner_client.adapter.interpolation",
    "InvalidData": "protocol.errors",
    "InvalidRequest": "protocol.errors",
    "MalformedMessage": "protocol.errors",
    "MemoryReport": "data_owner_client.memory.build_splits",
    "Misdirected": "protocol.errors",
    "NotAcceptable": "protocol.errors",
    "NotReady": "protocol.errors",
    "NumericalFault": "protocol.errors",
    "OverLimit": "protocol.errors",
    "Overloaded": "protocol.errors",
    "Pair": "data_owner_client.data.pairs",
    "PayloadTooLarge": "protocol.errors",
    "PemaError": "protocol.errors",
    "ProtocolViolation": "protocol.errors",
    "QuotaExceeded": "protocol.errors",
    "ReadingSettings": "data_owner_client.data.reading.settings",
    "Redaction": "data_owner_client.data.redaction.rules",
    "RedactionRules": "data_owner_client.data.redaction.rules",
    "RemotePlm": "data_owner_client.plm.remote_plm",
    "RequestTimeout": "protocol.errors",
    "SamplingSettings": "data_owner_client.decoding.settings",
    "ScoringSettings": "data_owner_client.scoring.settings",
    "ServerFault": "protocol.errors",
    "Task": "data_owner_client.data.tasks",
    "TimedOut": "protocol.errors",
    "TrainedAdapter": "data_owner_client.adapter.trained",
    "TrainingReport": "data_owner_client.training.train",
    "TrainingSettings": "data_owner_client.training.settings",
    "Unauthenticated": "protocol.errors",
    "Unsupported": "protocol.errors",
    "UnsupportedMediaType": "protocol.errors",
    "Untrusted": "protocol.errors",
    "build_memories": "data_owner_client.memory.build_splits",
    "connect": "data_owner_client.plm.connect",
    "evaluate": "data_owner_client.evaluation.evaluate",
    "generate": "data_owner_client.decoding.generation",
    "load_redaction": "data_owner_client.data.redaction.rules",
    "load_task": "data_owner_client.data.tasks",
    "read_pairs": "data_owner_client.data.reading.reader",
    "read_parallel": "data_owner_client.data.reading.reader",
    "spool_pairs": "data_owner_client.data.reading.reader",
    "train": "data_owner_client.training.train",
    "translate": "data_owner_client.decoding.generation",
}

__all__ = [
    "AnswerForm",
    "AnswerLost",
    "BudgetExhausted",
    "ConnectionFailed",
    "ConnectionSettings",
    "Conversation",
    "DecodingSettings",
    "Evaluation",
    "ExternalMemory",
    "Forbidden",
    "GatewayFailed",
    "GatewayTimeout",
    "Generation",
    "IdentityMismatch",
    "InProcessConnection",
    "Interpolation",
    "InvalidData",
    "InvalidRequest",
    "MalformedMessage",
    "MemoryReport",
    "Misdirected",
    "NotAcceptable",
    "NotReady",
    "NumericalFault",
    "OverLimit",
    "Overloaded",
    "Pair",
    "PayloadTooLarge",
    "PemaError",
    "ProtocolViolation",
    "QuotaExceeded",
    "ReadingSettings",
    "Redaction",
    "RedactionRules",
    "RemotePlm",
    "RequestTimeout",
    "SamplingSettings",
    "ScoringSettings",
    "ServerFault",
    "Task",
    "TimedOut",
    "TrainedAdapter",
    "TrainingReport",
    "TrainingSettings",
    "Unauthenticated",
    "Unsupported",
    "UnsupportedMediaType",
    "Untrusted",
    "build_memories",
    "connect",
    "evaluate",
    "generate",
    "load_redaction",
    "load_task",
    "read_pairs",
    "read_parallel",
    "spool_pairs",
    "train",
    "translate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

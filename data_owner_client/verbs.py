"""The verbs of `pema-client` as a typed Python API. The command line is a thin skin of this module.

    with connect("http://127.0.0.1:8000") as plm:
        build_memories(plm, load_task("translate-en-de"), read_pairs("pairs.jsonl"), Path("memory"))
        adapter, _ = train(plm, Path("memory"), Path("adapter"))
        print(translate(plm, ["The device is offline."], adapter=adapter).texts)

All raise `protocol.errors.PemaError`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from data_owner_client.adapter import Adaptation
from data_owner_client.connection import GIVE_UP_AFTER_S, open_connection
from data_owner_client.data import Pair, split_validation
from data_owner_client.decoding.interpolation import Interpolation
from data_owner_client.decoding.lookup import Lookup
from data_owner_client.decoding.rounds import DEFAULT_DECODING, DecodingSettings
from data_owner_client.evaluation import Perplexities, TextScores, perplexities, text_scores
from data_owner_client.fitting import TrainingReport, train
from data_owner_client.generation import Generation, translate
from data_owner_client.memory import build_memory
from data_owner_client.memory.build import TokenizedPair, encode_all, tokenize_pairs
from data_owner_client.memory.store import TRAIN, VALIDATION, ContextMode, ModelIdentity
from data_owner_client.nearest import tasks_for
from data_owner_client.plm import RemotePlm
from data_owner_client.progress import Reporter
from data_owner_client.tasks import Task
from protocol.errors import InvalidData, PemaError
from protocol.messages import WireDtype

__all__ = [
    "Evaluation",
    "MemoryReport",
    "TrainingReport",
    "build_memories",
    "connect",
    "disclosure",
    "evaluate",
    "train",
]


class MemoryReport(BaseModel):
    """What `build_memories` made."""

    folder: str
    examples: int
    rows: int
    validation_examples: int
    validation_rows: int
    context_mode: ContextMode
    length_ratio: float
    seconds: float


class Evaluation(BaseModel):
    """Scores of the PLM alone and with the adapter, on the same pairs and prompts."""

    plm: TextScores
    pema: TextScores
    perplexity: Perplexities | None
    plm_texts: list[str]
    pema_texts: list[str]
    seconds: dict[str, float]


def connect(
    url: str,
    *,
    dtype: WireDtype = "float16",
    api_key: str | None = None,
    insecure: bool = False,
    ca: Path | None = None,
    client_certificate: Path | None = None,
    client_key: Path | None = None,
    timeout_s: float = 600.0,
    give_up_after_s: float = GIVE_UP_AFTER_S,
) -> RemotePlm:
    """The PLM behind a server. The arguments: see `connection.open_connection` and `RemotePlm`.

    Raises:
        ConnectionFailed: nobody answers there.
        Untrusted: it cannot prove who it is.
        Unauthenticated: the owner asks for a key, or for a certificate.
        Forbidden: the key does not allow to see the model card.
        InvalidRequest: the URL is none, `ca` holds no certificate, or the key would travel in the clear.
    """
    connection = open_connection(
        url,
        api_key=api_key,
        insecure=insecure,
        ca=ca,
        client_certificate=client_certificate,
        client_key=client_key,
        timeout_s=timeout_s,
        give_up_after_s=give_up_after_s,
    )
    try:
        return RemotePlm(connection, dtype=dtype)
    except PemaError:
        connection.close()
        raise


def build_memories(
    plm: RemotePlm,
    task: Task,
    pairs: Sequence[Pair],
    folder: Path,
    *,
    validation: Sequence[Pair] | None = None,
    validation_fraction: float = 0.05,
    context_mode: ContextMode = "private",
    share_targets: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> MemoryReport:
    """Build `folder/train` and `folder/validation`, or finish what an interrupted run began.

    Without `validation` pairs, a share of `pairs` is set aside. What the other arguments mean, and what is raised: see
    `memory.build_memory`.
    """
    started = time.perf_counter()
    if validation is None:
        train_pairs, held_out = split_validation(pairs, validation_fraction)
    else:
        train_pairs, held_out = list(pairs), list(validation)
    reporter = reporter or Reporter()
    if share_targets or context_mode == "private":
        reporter.say(disclosure(context_mode))
    memories = [
        build_memory(
            plm,
            task,
            part,
            folder / name,
            context_mode=context_mode,
            share_targets=share_targets,
            with_logsumexp=name == VALIDATION,
            overwrite=overwrite,
            reporter=reporter,
        )
        for name, part in ((TRAIN, train_pairs), (VALIDATION, held_out))
    ]
    return MemoryReport(
        folder=str(folder),
        examples=memories[0].manifest.examples,
        rows=memories[0].manifest.rows,
        validation_examples=memories[1].manifest.examples,
        validation_rows=memories[1].manifest.rows,
        context_mode=context_mode,
        length_ratio=memories[0].length_ratio,
        seconds=time.perf_counter() - started,
    )


def disclosure(context_mode: ContextMode) -> str:
    """What leaves this machine while a memory is built, in one line."""
    if context_mode == "private":
        return "Leaves this machine: the prompts with their source texts, and the targets' lengths. No target text."
    return "Leaves this machine: the prompts with their source texts, and every target text (--share-targets)."


def evaluate(
    plm: RemotePlm,
    pairs: Sequence[Pair],
    adapter: Adaptation,
    *,
    interpolation: Interpolation | None = None,
    share_targets: bool = False,
    decoding: DecodingSettings = DEFAULT_DECODING,
    lookup: Lookup | None = None,
    consensus: int = 0,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Translate the sources with the PLM alone and with the adapter, and score both against the targets.

    The texts are scored on this machine. Perplexity needs the PLM's view of the targets themselves, so it is computed
    only with `share_targets`. A consensus (see `GenerationOptions`) is for the adapter alone.

    Raises:
        As `translate`.
    """
    task, interpolation = adapter.card.task, interpolation or adapter.card.interpolation
    sources, references = [pair.source for pair in pairs], [_target(pair) for pair in pairs]

    def run(with_adapter: Adaptation | None) -> Generation:
        return translate(
            plm,
            sources,
            adapter=with_adapter,
            task=task,
            interpolation=interpolation,
            decoding=decoding,
            lookup=lookup if with_adapter else None,
            consensus=consensus if with_adapter else 0,
            reporter=reporter,
        )

    # What could fail should fail before the long work.
    adapter.card.model.require(ModelIdentity.of(plm.card), "The adapter", "the server")
    views: list[list[TokenizedPair]] = []
    if share_targets:
        views = [
            tokenize_pairs(plm, tasks_for(plm, task, sources, nearest), pairs, place="pair")
            for nearest in ([None, adapter.nearest] if adapter.nearest else [None])
        ]
    alone, adapted = run(None), run(adapter)
    started = time.perf_counter()
    perplexity = None
    if share_targets:
        rows = [encode_all(plm, view, reporter or Reporter()) for view in views]
        perplexity = perplexities(plm, adapter, rows[0], interpolation, *rows[1:])
    return Evaluation(
        plm=text_scores(alone.texts, references),
        pema=text_scores(adapted.texts, references),
        perplexity=perplexity,
        plm_texts=alone.texts,
        pema_texts=adapted.texts,
        seconds={
            "translate_plm": alone.seconds,
            "translate": adapted.seconds,
            "perplexity": time.perf_counter() - started,
        },
    )


def _target(pair: Pair) -> str:
    if pair.target is None:
        raise InvalidData("A pair has no target.", hint="Evaluation needs references.")
    return pair.target

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
from dataclasses import asdict, replace
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import Tensor

from data_owner_client import plotting
from data_owner_client.adapter import AdapterCard, TrainedAdapter
from data_owner_client.connection import GIVE_UP_AFTER_S, open_connection
from data_owner_client.data import Pair, split_validation
from data_owner_client.decoding.interpolation import Interpolation
from data_owner_client.decoding.lookup import Lookup
from data_owner_client.decoding.rounds import DEFAULT_DECODING, DecodingSettings
from data_owner_client.evaluation import Perplexities, TextScores, perplexities, plm_target_logprobs, text_scores
from data_owner_client.generation import Generation, translate
from data_owner_client.memory import ExternalMemory, MemoryRows, build_memory
from data_owner_client.memory.build import TokenizedPair, encode_teacher_forced, require_fits, tokenize_pair
from data_owner_client.memory.planning import Sizes, plan_requests
from data_owner_client.memory.store import TRAIN, VALIDATION, ContextMode, ModelIdentity
from data_owner_client.plm import RemotePlm, token_set
from data_owner_client.progress import Reporter
from data_owner_client.tasks import Task
from data_owner_client.training import (
    Survey,
    TrainingSettings,
    ValidationData,
    choose_interpolation,
    target_logprobs,
    train_adapter,
)
from protocol.errors import InvalidData, PemaError
from protocol.head import LMHead
from protocol.messages import WireDtype

# In the adapter's folder, until it is done.
_CHECKPOINT = ".training.safetensors"


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


class TrainingReport(BaseModel):
    """What `train` made."""

    folder: str
    card: AdapterCard
    history: list[dict[str, float | int | str | None]]
    schedules: dict[str, dict[str, float]]
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
    timeout_s: float = 600.0,
    give_up_after_s: float = GIVE_UP_AFTER_S,
) -> RemotePlm:
    """The PLM behind a server. The arguments: see `connection.open_connection` and `RemotePlm`.

    Raises:
        ConnectionFailed: nobody answers there.
        Unauthenticated: the owner asks for a key.
        InvalidRequest: the URL is none, or the key would travel in the clear.
    """
    connection = open_connection(
        url, api_key=api_key, insecure=insecure, timeout_s=timeout_s, give_up_after_s=give_up_after_s
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


def train(
    plm: RemotePlm,
    memory: Path,
    folder: Path,
    *,
    settings: TrainingSettings | None = None,
    reporter: Reporter | None = None,
) -> tuple[TrainedAdapter, TrainingReport]:
    """Train an adapter on the memories that `build_memories` made; write it and `training.png` into `folder`.

    The server is asked for the head rows of the candidate vocabulary only, unless the full one is wanted. The schedule
    and λ_max to translate with are those of the highest likelihood on the validation memory.

    The memory is read from disk as it is needed, so it may be larger than RAM. Interrupted, the same call goes on where
    it was, to the same adapter.

    Raises:
        InvalidData: a memory is missing, incomplete or damaged.
        IdentityMismatch: the memory was built with another model.
        InvalidRequest: there is no such device.
        NumericalFault: the loss is no longer finite.
    """
    started = time.perf_counter()
    reporter = reporter or Reporter()
    train_memory, validation_memory = ExternalMemory(memory / TRAIN), ExternalMemory(memory / VALIDATION)
    plan = train_memory.manifest.plan
    for part in (train_memory, validation_memory):
        part.manifest.plan.model.require(ModelIdentity.of(plm.card), f"The memory in {part.folder}", "the server")
        part.require_complete()
    settings = _with_form(settings or TrainingSettings(), plan.model)
    survey = Survey.of(train_memory)
    if settings.full_vocabulary:
        survey = replace(survey, candidate_ids_C=torch.arange(plan.model.vocab_size))
    candidate_ids_C = survey.candidate_ids_C
    head, validation = _head_and_validation(
        plm, candidate_ids_C, validation_memory.load(), train_memory.length_ratio, reporter
    )
    checkpoint = folder / _CHECKPOINT
    trained = train_adapter(
        train_memory,
        survey,
        head,
        validation,
        settings,
        checkpoint=checkpoint,
        identity=[train_memory.digest, validation_memory.digest, plan.model.model_dump()],
        reporter=reporter,
    )

    pema_logprob_N = target_logprobs(trained.adapter, head, validation.data)
    interpolation, schedules = choose_interpolation(validation, pema_logprob_N)
    plm_nll = -validation.plm_logprob_N.mean().item()
    mixture_nll = validation.mixture_nll(pema_logprob_N, interpolation)
    why = (
        f"{interpolation.schedule} with λ_max {interpolation.lambda_max:.2f} has the highest likelihood on "
        f"{validation_memory.manifest.examples} validation examples: {mixture_nll:.3f} nats per token (the PLM alone: "
        f"{plm_nll:.3f}), in {plan.context_mode} contexts"
    )
    reporter.say(f"Interpolation: {why}.")
    card = AdapterCard(
        model=plan.model,
        task=plan.task,
        context_mode=plan.context_mode,
        form=trained.adapter.form,
        rank=trained.adapter.A.out_features,
        candidates=len(candidate_ids_C),
        length_ratio=train_memory.length_ratio,
        mean_length=train_memory.manifest.rows / train_memory.manifest.examples,
        interpolation=interpolation,
        interpolation_why=why,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        settings=asdict(settings),
        validation={
            "plm_nll": plm_nll,
            "mixture_nll": mixture_nll,
            "coverage": (validation.data.label_N >= 0).float().mean().item(),
        },
        memory_digest=train_memory.digest,
    )
    adapter = TrainedAdapter(card, trained.adapter, candidate_ids_C, head)
    adapter.save(folder)
    # Also what a kill may have left of one.
    for path in (checkpoint, *folder.glob(f".{_CHECKPOINT}.*.partial")):
        path.unlink(missing_ok=True)
    plotting.training(trained.history, plm_nll, folder / "training.png")
    return adapter, TrainingReport(
        folder=str(folder),
        card=card,
        history=[asdict(epoch) for epoch in trained.history],
        schedules={name: {"lambda_max": i.lambda_max, "nll": nll} for name, (i, nll) in schedules.items()},
        seconds=time.perf_counter() - started,
    )


def evaluate(
    plm: RemotePlm,
    pairs: Sequence[Pair],
    adapter: TrainedAdapter,
    *,
    interpolation: Interpolation | None = None,
    share_targets: bool = False,
    decoding: DecodingSettings = DEFAULT_DECODING,
    lookup: Lookup | None = None,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Translate the sources with the PLM alone and with the adapter, and score both against the targets.

    The texts are scored on this machine. Perplexity needs the PLM's view of the targets themselves, so it is computed
    only with `share_targets`.

    Raises:
        As `translate`.
    """
    task, interpolation = adapter.card.task, interpolation or adapter.card.interpolation
    sources, references = [pair.source for pair in pairs], [_target(pair) for pair in pairs]

    def run(with_adapter: TrainedAdapter | None) -> Generation:
        return translate(
            plm,
            sources,
            adapter=with_adapter,
            task=task,
            interpolation=interpolation,
            decoding=decoding,
            lookup=lookup if with_adapter else None,
            reporter=reporter,
        )

    # What could fail should fail before the long work.
    adapter.card.model.require(ModelIdentity.of(plm.card), "The adapter", "the server")
    tokenized: list[TokenizedPair] = []
    if share_targets:
        for number, pair in enumerate(pairs, 1):
            tokenized.append(tokenize_pair(plm, task, pair, place=f"pair {number}"))
            require_fits(plm, tokenized[-1], place=f"pair {number}")
    alone, adapted = run(None), run(adapter)
    started = time.perf_counter()
    perplexity = None
    if share_targets:
        rows = _teacher_forced_rows(plm, tokenized, reporter or Reporter())
        perplexity = perplexities(plm, adapter, rows, interpolation)
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


def _teacher_forced_rows(plm: RemotePlm, pairs: Sequence[TokenizedPair], reporter: Reporter) -> MemoryRows:
    sizes = Sizes()
    for pair in pairs:
        sizes.append(len(pair.prompt) + len(pair.target), len(pair.target))
    parts = []
    with reporter.bar("perplexity", len(pairs), "pairs") as bar:
        for run in plan_requests(sizes, plm.card, plm.dtype, done=0, examples_per_shard=len(pairs)):
            parts.append(encode_teacher_forced(plm, [pairs[i] for i in run], with_logsumexp=True))
            bar.advance(len(run))
    return MemoryRows.concatenate(parts)


def _target(pair: Pair) -> str:
    if pair.target is None:
        raise InvalidData("A pair has no target.", hint="Evaluation needs references.")
    return pair.target


def _head_and_validation(
    plm: RemotePlm, candidate_ids_C: Tensor, held_out: MemoryRows, length_ratio: float, reporter: Reporter
) -> tuple[LMHead, ValidationData]:
    """Float32 head rows of the candidates; and the held-out rows with the PLM's likelihood of their targets."""
    # One request for both memories: the server need not know which tokens are those of the few held-out texts.
    target_ids_K = token_set([candidate_ids_C, held_out.target_N])
    if len(target_ids_K) == plm.card.vocab_size:
        target_head = plm.full_head(reporter).to(torch.float32)
    else:
        reporter.say(
            "Leaves this machine: which tokens occur anywhere in the targets, as their LM-head rows are asked for."
        )
        target_head = plm.head_rows(target_ids_K)
    plm_logprob_N = plm_target_logprobs(target_head, target_ids_K, held_out)
    head = target_head
    if len(candidate_ids_C) < len(target_ids_K):
        head = target_head.rows(torch.searchsorted(target_ids_K, candidate_ids_C))
    return head, ValidationData.of(held_out, candidate_ids_C, plm_logprob_N, length_ratio)


def _with_form(settings: TrainingSettings, model: ModelIdentity) -> TrainingSettings:
    in_head_space = model.cr_kind == "last_hidden_state"
    if settings.form == "residual" and not in_head_space:
        raise InvalidData(
            f"The residual form adds to the LM head's input, and this memory holds {model.cr_kind}.",
            hint="Use --form paper.",
        )
    return replace(settings, form=settings.form or ("residual" if in_head_space else "paper"))

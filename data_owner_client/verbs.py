"""The verbs of `pema-client` as a typed Python API. The command line is a thin skin of this module.

    with connect("http://127.0.0.1:8000") as plm:
        build_memories(plm, load_task("translate-en-de"), read_pairs("pairs.jsonl"), Path("memory"))
        adapter, _ = train(plm, Path("memory"), Path("adapter"))
        print(translate(plm, ["The device is offline."], adapter=adapter).texts)

All raise `protocol.errors.PemaError`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from pydantic import BaseModel

from data_owner_client import plotting
from data_owner_client.adapter import AdapterCard, TrainedAdapter
from data_owner_client.connection import GIVE_UP_AFTER_S, open_connection
from data_owner_client.data import Pair, split_validation
from data_owner_client.decoding.choosing import Choice
from data_owner_client.decoding.generate import (
    DEFAULT_DECODING,
    Continuation,
    DecodingSettings,
    Usage,
    require_room,
)
from data_owner_client.decoding.generate import generate as generate_ids
from data_owner_client.decoding.interpolation import Interpolation
from data_owner_client.decoding.lookup import Lookup
from data_owner_client.decoding.sampling import Sampling
from data_owner_client.evaluation import Perplexities, TextScores, perplexities, plm_target_logprobs, text_scores
from data_owner_client.memory import ExternalMemory, MemoryRows, build_memory
from data_owner_client.memory.build import encode_teacher_forced, require_fits, tokenize_pair
from data_owner_client.memory.store import ContextMode, ModelIdentity
from data_owner_client.plm import RemotePlm, token_set
from data_owner_client.progress import Reporter
from data_owner_client.tasks import Task
from data_owner_client.tokenization import Prompt
from data_owner_client.training import (
    TrainingData,
    TrainingSettings,
    ValidationData,
    choose_interpolation,
    target_logprobs,
    train_adapter,
)
from protocol.errors import InvalidData, PemaError
from protocol.messages import WireDtype

OnFailure = Callable[[int, PemaError], None]
"""Told of a text, by its number from 0, and why it cannot be answered."""
OnToken = Callable[[int, int], None]
"""Told of a token: the number of its text from 0, and its id."""
TRAIN, VALIDATION = "train", "validation"
_PAIRS_PER_REQUEST = 64


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


@dataclass(frozen=True)
class Generation:
    """What was generated, in the order of the inputs, and what it took.

    Attributes:
        texts: one for each input, the best if several were drawn.
        token_ids: of these texts.
        best: for each input all texts that were asked for, the most probable one first.
        choices: how each of the token ids was chosen.
    """

    texts: list[str]
    token_ids: list[list[int]]
    best: list[list[str]]
    choices: list[list[Choice]]
    usage: Usage
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


def lookup_in(memory: Path) -> Lookup:
    """Where drafts are looked up: the targets of a memory.

    The owner of the PLM sees the drafts, so it must have seen the targets before.

    Raises:
        InvalidData: the memory's targets were not shared, or it is missing or damaged.
    """
    part = ExternalMemory(memory / TRAIN)
    if part.manifest.plan.context_mode != "teacher-forced":
        raise InvalidData(
            f"The targets of {memory} were never shown to the PLM's owner, and drafts would be pieces of them.",
            hint="Leave --lookup away, or use a memory that was built with --share-targets.",
        )
    rows = part.load()
    return Lookup(ids_T.tolist() for ids_T in rows.target_N.split(rows.rows_E.tolist()))


def train(
    plm: RemotePlm,
    memory: Path,
    folder: Path,
    *,
    settings: TrainingSettings | None = None,
    reporter: Reporter | None = None,
) -> tuple[TrainedAdapter, TrainingReport]:
    """Train an adapter on the memories that `build_memories` made; write it and `training.png` into `folder`.

    The server is asked for the head rows of the candidate vocabulary only. The schedule and λ_max to translate with are
    those of the highest likelihood on the validation memory.

    Raises:
        InvalidData: a memory is missing, incomplete or damaged.
        IdentityMismatch: the memory was built with another model.
    """
    started = time.perf_counter()
    reporter = reporter or Reporter()
    train_memory, validation_memory = ExternalMemory(memory / TRAIN), ExternalMemory(memory / VALIDATION)
    plan = train_memory.manifest.plan
    for part in (train_memory, validation_memory):
        part.manifest.plan.model.require(ModelIdentity.of(plm.card), f"The memory in {part.folder}", "the server")
    settings = _with_form(settings or TrainingSettings(), plan.model)
    rows, held_out = train_memory.load(), validation_memory.load()
    candidate_ids_C = token_set([rows.target_N])
    # One request for both memories: the server need not know which tokens are those of the few held-out texts.
    target_ids_K = token_set([rows.target_N, held_out.target_N])
    reporter.say(
        "Leaves this machine: which tokens occur anywhere in the targets, as their LM-head rows are asked for."
    )
    target_head = plm.head_rows(target_ids_K)
    head = target_head.rows(torch.searchsorted(target_ids_K, candidate_ids_C))
    validation = ValidationData.of(
        held_out,
        candidate_ids_C,
        plm_target_logprobs(target_head, target_ids_K, held_out),
        train_memory.length_ratio,
    )
    trained = train_adapter(TrainingData.of(rows, candidate_ids_C), head, validation, settings, reporter)

    pema_logprob_N = target_logprobs(trained.adapter, head, validation.data)
    interpolation, schedules = choose_interpolation(validation, pema_logprob_N)
    plm_nll = -validation.plm_logprob_N.mean().item()
    mixture_nll = validation.mixture_nll(pema_logprob_N, interpolation)
    why = (
        f"{interpolation.schedule} with λ_max {interpolation.lambda_max:.2f} has the highest likelihood on "
        f"{len(held_out.rows_E)} validation examples: {mixture_nll:.3f} nats per token (the PLM alone: {plm_nll:.3f}), "
        f"in {plan.context_mode} contexts"
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
        mean_length=len(rows.target_N) / len(rows.rows_E),
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
    plotting.training(trained.history, plm_nll, folder / "training.png")
    return adapter, TrainingReport(
        folder=str(folder),
        card=card,
        history=[asdict(epoch) for epoch in trained.history],
        schedules={name: {"lambda_max": i.lambda_max, "nll": nll} for name, (i, nll) in schedules.items()},
        seconds=time.perf_counter() - started,
    )


def translate(
    plm: RemotePlm,
    sources: Sequence[str],
    *,
    adapter: TrainedAdapter | None = None,
    task: Task | None = None,
    interpolation: Interpolation | None = None,
    decoding: DecodingSettings = DEFAULT_DECODING,
    lookup: Lookup | None = None,
    sampling: Sampling | None = None,
    samples: int = 1,
    best: int = 1,
    on_failure: OnFailure | None = None,
    on_token: OnToken | None = None,
    reporter: Reporter | None = None,
) -> Generation:
    """Answer source texts with a task's prompt.

    Args:
        plm: the PLM.
        sources: texts.
        adapter: the data owner's adapter; None for the PLM alone.
        task: the adapter's own unless given.
        interpolation: what training chose unless given.
        decoding: length, look-ahead, batch size.
        lookup: where drafts are looked up (`lookup_in`); the owner of the PLM sees them.
        sampling: how to draw tokens; None for the most probable ones. The text depends on the seed, not on drafts.
        samples: texts to draw for each source.
        best: of these, how many of the most probable ones to give.
        on_failure: told of each text (by its number, from 0) that cannot be answered; its result is then empty. Without
            it, such a text is an error of the whole.
        on_token: told of every token as soon as it is certain: the number of its text, and its id.
        reporter: told of the progress.

    Raises:
        InvalidData: neither adapter nor task is given, or a text is too long.
        IdentityMismatch: the adapter belongs to another model.
    """
    task = task or (adapter.card.task if adapter else None)
    if task is None:
        raise InvalidData("Without an adapter there is no task.", hint="Give one with --task.")
    tokenizer = plm.tokenizer
    return _generate(
        plm,
        [task.prompt(source, tokenizer) for source in sources],
        task,
        adapter=adapter,
        interpolation=interpolation,
        horizons=[adapter.horizon(tokenizer.count(source)) for source in sources] if adapter else None,
        decoding=decoding,
        lookup=lookup,
        sampling=sampling,
        samples=samples,
        best=best,
        on_failure=on_failure,
        on_token=on_token,
        reporter=reporter,
    )


def generate(
    plm: RemotePlm,
    prompts: Sequence[str],
    *,
    adapter: TrainedAdapter | None = None,
    task: Task | None = None,
    interpolation: Interpolation | None = None,
    decoding: DecodingSettings = DEFAULT_DECODING,
    lookup: Lookup | None = None,
    sampling: Sampling | None = None,
    samples: int = 1,
    best: int = 1,
    on_failure: OnFailure | None = None,
    on_token: OnToken | None = None,
    reporter: Reporter | None = None,
) -> Generation:
    """Continue prompts as they are, without a task's template around them.

    A bare prompt has no source text to predict a length from: Gradual Unrolling then uses the mean target length of the
    memory. The other arguments, and what is raised: see `translate`. The task only says where an answer stops.
    """
    return _generate(
        plm,
        [Prompt(prompt) for prompt in prompts],
        task or (adapter.card.task if adapter else Task(name="bare")),
        adapter=adapter,
        interpolation=interpolation,
        horizons=[adapter.card.mean_length] * len(prompts) if adapter else None,
        decoding=decoding,
        lookup=lookup,
        sampling=sampling,
        samples=samples,
        best=best,
        on_failure=on_failure,
        on_token=on_token,
        reporter=reporter,
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
    if share_targets:
        for number, pair in enumerate(pairs, 1):
            require_fits(plm, tokenize_pair(plm, task, pair, place=f"pair {number}"), place=f"pair {number}")
    alone, adapted = run(None), run(adapter)
    started = time.perf_counter()
    perplexity = None
    if share_targets:
        rows = _teacher_forced_rows(plm, task, pairs, reporter or Reporter())
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


def _generate(
    plm: RemotePlm,
    prompts: Sequence[Prompt],
    task: Task,
    *,
    adapter: TrainedAdapter | None,
    interpolation: Interpolation | None,
    horizons: list[float] | None,
    decoding: DecodingSettings,
    lookup: Lookup | None,
    sampling: Sampling | None,
    samples: int,
    best: int,
    on_failure: OnFailure | None,
    on_token: OnToken | None,
    reporter: Reporter | None,
) -> Generation:
    started = time.perf_counter()
    if adapter is not None:
        adapter.card.model.require(ModelIdentity.of(plm.card), "The adapter", "the server")
    tokenizer = plm.tokenizer
    prompt_ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    numbers = list(range(len(prompts)))
    if on_failure is not None:
        for number, ids in enumerate(prompt_ids):
            try:
                require_room(plm, ids, place=f"text {number + 1}")
            except InvalidData as error:
                on_failure(number, error)
                numbers.remove(number)
    # Samples of the same prompt one after another: they share all of its attention states.
    continuations, usage = generate_ids(
        plm,
        [prompt_ids[number] for number in numbers for _ in range(samples)],
        adapter=adapter,
        interpolation=interpolation or (adapter.card.interpolation if adapter else Interpolation(schedule="none")),
        horizons=None if horizons is None else [horizons[number] for number in numbers for _ in range(samples)],
        stop_ids=task.stop_ids(tokenizer) | frozenset(plm.card.eos_token_ids),
        settings=decoding,
        sampling=sampling,
        samples=list(range(samples)) * len(numbers),
        lookup=lookup,
        on_token=None if on_token is None else lambda at, token: on_token(numbers[at // samples], token),
        reporter=reporter,
    )
    ranked: list[list[Continuation]] = [[Continuation([], [])] for _ in prompts]
    for at, number in enumerate(numbers):
        own = continuations[at * samples : (at + 1) * samples]
        ranked[number] = sorted(own, key=_mean_logprob, reverse=True)[:best]
    texts = [[task.answer(one.token_ids, tokenizer) for one in own] for own in ranked]
    return Generation(
        texts=[own[0] for own in texts],
        token_ids=[own[0].token_ids for own in ranked],
        best=texts,
        choices=[own[0].choices for own in ranked],
        usage=usage,
        seconds=time.perf_counter() - started,
    )


def _mean_logprob(continuation: Continuation) -> float:
    # Of its tokens: the sum would prefer short texts.
    return continuation.logprob / len(continuation.token_ids)


def _teacher_forced_rows(plm: RemotePlm, task: Task, pairs: Sequence[Pair], reporter: Reporter) -> MemoryRows:
    tokenized = [tokenize_pair(plm, task, pair, place=f"pair {n}") for n, pair in enumerate(pairs, 1)]
    step = min(_PAIRS_PER_REQUEST, plm.card.limits.max_sequences)
    parts = []
    with reporter.bar("perplexity", len(pairs), "pairs") as bar:
        for at in range(0, len(pairs), step):
            parts.append(encode_teacher_forced(plm, tokenized[at : at + step], with_logsumexp=True))
            bar.advance(len(parts[-1].rows_E))
    return MemoryRows.concatenate(parts)


def _target(pair: Pair) -> str:
    if pair.target is None:
        raise InvalidData("A pair has no target.", hint="Evaluation needs references.")
    return pair.target


def _with_form(settings: TrainingSettings, model: ModelIdentity) -> TrainingSettings:
    in_head_space = model.cr_kind == "last_hidden_state"
    if settings.form == "residual" and not in_head_space:
        raise InvalidData(
            f"The residual form adds to the LM head's input, and this memory holds {model.cr_kind}.",
            hint="Use --form paper.",
        )
    return replace(settings, form=settings.form or ("residual" if in_head_space else "paper"))

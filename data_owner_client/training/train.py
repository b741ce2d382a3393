"""The verb `train`: choose settings and a decoding policy, write the adapter and its report."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from pydantic import BaseModel

from data_owner_client.adapter.card import AdapterCard, MemberCard
from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.adapter.types import AdapterForm
from data_owner_client.data.pairs import digest_pairs
from data_owner_client.memory.grants import cached_distributions
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.arguments import AnyPath, to_path
from data_owner_client.runtime.atomic_files import require_writable, write_atomically
from data_owner_client.runtime.memory_usage import peak_rss_mb
from data_owner_client.runtime.path_text import PathText
from data_owner_client.runtime.progress import Reporter
from data_owner_client.scoring.scorer import scores_in_words
from data_owner_client.training.decoded_policies import TextStore
from data_owner_client.training.decoding_policy import DEFAULT_RETRIEVED_EXAMPLES, max_policies, select_decoding_policy
from data_owner_client.training.exchange import Exchange
from data_owner_client.training.inputs import Memories, TrainingInput, resolve_settings
from data_owner_client.training.member_selection import Member, network_of, select_members
from data_owner_client.training.plots import plot_training
from data_owner_client.training.policies import DecodingPolicy
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.settings_search import search_settings
from data_owner_client.training.time_budget import TimeBudget, Wish, WorkCosts, WorkPlan, WorkWishes
from data_owner_client.training.trainer import Trained
from data_owner_client.training.work_costs import estimate_costs
from protocol.errors import InvalidData

# Prefix of checkpoints and decoded texts in the adapter's folder, which are deleted at the end.
_CHECKPOINTS = ".training-"
REPORT = "training.json"


class Trial(BaseModel):
    """Settings that were tried, and their validation loss at the best constant λ, in nats per token."""

    settings: dict[str, bool | int | float | str | None]
    nll: float


class TrainingReport(BaseModel):
    """Report of a call of `train`, which is stored as `training.json` beside the adapter.

    Attributes:
        folder: folder of the adapter.
        card: card of the adapter.
        history: epochs of the chosen training.
        trials: all trainings, in their order.
        options: decoding policies that were tried on the held-out pairs, the chosen one first.
        seconds: duration of the call.
        peak_rss_mb: largest resident memory of this process so far.
        memory: folder of both memories; None in reports of earlier versions.
        exchange: counts of what client and owner have shown each other; None in reports of earlier versions, or if
            texts of the memory are missing.
    """

    folder: PathText
    card: AdapterCard
    history: list[dict[str, float | int | str | None]]
    trials: list[Trial]
    options: list[DecodingPolicy]
    seconds: float
    peak_rss_mb: float
    memory: PathText | None = None
    exchange: Exchange | None = None


def train(
    plm: RemotePlm,
    memory: AnyPath,
    folder: AnyPath,
    *,
    settings: TrainingSettings | None = None,
    reporter: Reporter | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[TrainedAdapter, TrainingReport]:
    """Train an adapter on the memories that `build_memories` made; write it, its report and a plot into `folder`.

    The server sends the LM-head rows of the candidates only, unless the settings ask for the full vocabulary.

    The decoding policy is chosen on the validation memory, first by likelihood: schedule and λ_max, or a learned gate.
    If the targets were shared, prompts with retrieved examples are tried, too. Then some texts are decoded with
    constant values of λ. The headline metric of the task's kind, smoothed over λ, decides. The likeliest policy or a
    length reward must be clearly better than that. Of a redacted memory no text is decoded, as the texts of the adapter
    would show what was redacted.

    All of it takes at most `settings.minutes`, as far as estimates hold; the training itself is done in any case. The
    reporter says before the start what fits and what is left out.

    The memory is read from disk as needed, so it may be larger than RAM. After an interruption, the same call goes on
    where it was, with the minutes that are left, to the same adapter, bit for bit, if the same work fits. A gate for
    prompts with retrieved examples is the exception: the server computes its inputs again, so it is equal up to their
    rounding.

    Args:
        plm: the PLM.
        memory: folder of both memories.
        folder: folder of the adapter; created if it is missing.
        settings: settings; None for the defaults.
        reporter: receives the plan and the progress; None for no reports.
        clock: seconds of a monotonic clock, for the minutes.

    Raises:
        InvalidData: a memory is missing, incomplete or damaged, or does not allow these settings. Or the folder is not
            writable.
        IdentityMismatch: the memory was built with another model.
        InvalidRequest: the device does not exist, or its memory is too small.
        NumericalFault: the loss is not finite.
        PemaError: a call to the PLM failed.
    """
    memory, folder, reporter = to_path(memory), to_path(folder), reporter or Reporter()
    settings = settings or TrainingSettings()
    began, budget = clock(), TimeBudget(60 * settings.minutes, clock)
    require_writable(folder)
    memories = Memories.open(memory, plm)
    plan = memories.plan
    forms: list[AdapterForm] = [] if settings.form else ["paper"]
    if forms and plan.model.cr_kind == "last_hidden_state":
        forms += ["residual", "recent"]
    candidate_settings = resolve_settings(settings, plan)
    _require_shared(settings, memories)
    inputs = TrainingInput.from_memories(plm, memories, settings, reporter)

    work = _plan_work(plm, memories, inputs, candidate_settings, budget)
    if plan.context_mode == "redacted":
        reporter.say("The policy is chosen by likelihood alone: decoded texts would show what was redacted.")
    if settings.minutes:
        _say_plan(plm, work, settings.minutes, reporter)

    def checkpoint(tried: TrainingSettings) -> Path:
        name = hashlib.sha256(json.dumps(tried.of_network).encode()).hexdigest()[:16]
        return folder / f"{_CHECKPOINTS}{name}.safetensors"

    def fit(tried: TrainingSettings) -> Trained:
        # Trainings that ended before an interruption resume at their end.
        begin = clock()
        trained = inputs.fit(tried, checkpoint(tried), reporter, clock)
        budget.charge(max(0.0, trained.seconds - (clock() - begin)))
        return trained

    trials: list[Trial] = []

    def on_trial(tried: TrainingSettings, nll: float) -> None:
        trials.append(Trial(settings=asdict(tried), nll=nll))
        if work.search_seconds or len(candidate_settings) > 1:
            words = f"{tried.form}, rank {tried.rank}, κ {tried.kappa}, learning rate {tried.learning_rate}"
            words += f", dropout {tried.dropout}, seed {tried.seed}"
            words += f", pairing {tried.pairing}" if len(candidate_settings) > 1 else ""
            reporter.say(f"Tried {words}: {nll:.4f} nats per token.")

    def has_time_for(longest: float) -> bool:
        wishes, costs = replace(work.wishes, trainings=0), replace(work.costs, training=longest)
        return WorkPlan.within(budget.left, wishes, costs).search_seconds > 0

    trainings = search_settings(candidate_settings, fit, forms=forms, on_trial=on_trial, has_time_for=has_time_for)
    settings = trainings[0].settings
    members = select_members(trainings, settings.members, inputs.validation, inputs.targets.candidates)
    if len(trainings) > 1 and settings.members > 1:
        reporter.say(f"Averaged: {len(members)} of {len(trainings)} trainings.")
    wishes, planned_texts = replace(work.wishes, trainings=0, search=False), work.texts
    work = WorkPlan.within(budget.left, wishes, work.costs)
    with_policy = partial(assemble_adapter, memories, inputs, members)
    policies = select_decoding_policy(
        plm,
        memories,
        inputs,
        settings,
        with_policy,
        reporter,
        plan=work,
        budget=budget,
        store=TextStore(
            folder / _CHECKPOINTS,
            [inputs.identity, [[checkpoint(member.trained.settings).name, member.weight] for member in members]],
        ),
    )
    best = policies[0]
    if planned_texts and best.scores is None:
        reporter.say("Left out: the choice by decoded texts. What came before took longer than estimated.")
    why = f"{best}: {best.nll:.3f} nats per token of the validation examples (the PLM alone: {inputs.plm_nll:.3f})"
    if best.scores is not None:
        why += f", {scores_in_words(memories.scorer.metrics, best.scores)} on the decoded ones"
    reporter.say(f"Chosen: {why}.")
    adapter = with_policy(best, why)
    adapter.save(folder)
    plot_training(trainings[0].history, inputs.plm_nll, folder / "training.png")
    report = TrainingReport(
        folder=str(folder),
        card=adapter.card,
        history=[asdict(epoch) for epoch in trainings[0].history],
        trials=trials,
        options=policies,
        seconds=clock() - began,
        peak_rss_mb=peak_rss_mb(),
        memory=str(memory.absolute()),
        exchange=_exchange(plm, memories, inputs),
    )
    write_atomically(folder / REPORT, report.model_dump_json(indent=1).encode())
    # Includes partial files of a killed process.
    for path in [*folder.glob(f"{_CHECKPOINTS}*"), *folder.glob(f".{_CHECKPOINTS}*.partial")]:
        path.unlink(missing_ok=True)
    return adapter, report


def _exchange(plm: RemotePlm, memories: Memories, inputs: TrainingInput) -> Exchange | None:
    """Counts of what client and owner have shown each other until now; None if the texts are no longer there."""
    gives_rows = plm.card.head_policy != "none"
    try:
        return Exchange.from_memories(
            memories.train,
            memories.validation,
            head_rows=len(inputs.targets.ids_U) if gives_rows else 0,
            distributions=cached_distributions(plm),
        )
    except InvalidData:  # training needs the rows, and not always the texts
        return None


def _plan_work(
    plm: RemotePlm,
    memories: Memories,
    inputs: TrainingInput,
    candidate_settings: list[TrainingSettings],
    budget: TimeBudget,
) -> WorkPlan:
    """The work that fits into the budget, by estimates of its costs."""
    settings = candidate_settings[0]
    retrieval: Wish = "always" if settings.retrieved_examples else "if it fits"
    if settings.retrieved_examples == 0 or not memories.shows_targets:
        retrieval = "no"
    # An adapter continues texts with true tokens, which the owner would see.
    may_decode = memories.plan.context_mode != "redacted"
    wishes = WorkWishes(
        trainings=len(candidate_settings),
        search=settings.search,
        retrieval=retrieval,
        texts=min(settings.selection_texts, len(memories.held_out_pairs)) if may_decode else 0,
        policies=max_policies(memories.plan.task),
    )
    if not settings.minutes:  # nothing else fits, whatever it costs
        return WorkPlan.within(0.0, wishes, WorkCosts(training=1.0, retrieval=1.0, text=1.0, retrieved_text=1.0))
    count = 0 if retrieval == "no" else settings.retrieved_examples or DEFAULT_RETRIEVED_EXAMPLES
    costs = estimate_costs(plm, memories, inputs, settings, retrieved_examples=count, clock=budget.clock)
    return WorkPlan.within(budget.seconds, wishes, costs, used=budget.seconds - budget.left)


def _say_plan(plm: RemotePlm, work: WorkPlan, minutes: float, reporter: Reporter) -> None:
    reporter.say(f"Within {minutes:g} minutes: {', then '.join(work.steps)}.")
    if work.left_out:
        reporter.say(f"Left out for lack of time: {'; '.join(work.left_out)}.")
    for quota in plm.rate_limits:
        if quota.name == "day" and quota.left < work.decoding_tokens:
            reporter.say(
                f"The decoded texts take up to {work.decoding_tokens:,} tokens, and {quota.left:,} of {quota.quota:,} "
                "are left today. Use fewer --selection-texts, or run the same command again when it was refused."
            )


def assemble_adapter(
    memories: Memories,
    inputs: TrainingInput,
    members: Sequence[Member],
    policy: DecodingPolicy,
    why: str = "",
) -> TrainedAdapter:
    """The trained adapter with a decoding policy, and the reason for it, on its card.

    Args:
        memories: memories that it was trained on.
        inputs: inputs of the training.
        members: trainings whose distributions it averages, the heaviest first; one for a single network.
        policy: decoding policy.
        why: reason for the policy, in words.
    """
    plan, head = memories.plan, inputs.targets.candidates
    pairs = memories.shown_train_pairs if policy.nearest else []
    cards = [
        MemberCard(
            form=member.trained.adapter.form,
            rank=member.trained.adapter.rank,
            weight=member.weight,
            settings=asdict(member.trained.settings),
        )
        for member in members
    ]
    card = AdapterCard(
        model=plan.model,
        task=plan.task,
        context_mode=plan.context_mode,
        form=cards[0].form,
        rank=cards[0].rank,
        candidates=len(inputs.stats.candidate_ids_C),
        members=tuple(cards) if len(cards) > 1 else (),
        length_ratio=memories.train.length_ratio,
        mean_length=memories.train.manifest.rows / memories.train.manifest.examples,
        bounds=inputs.stats.bounds,
        nearest=policy.nearest,
        pairs_digest=digest_pairs(pairs) if pairs else "",
        interpolation=policy.interpolation,
        interpolation_why=why,
        label_temperature=policy.label_temperature,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        settings=cards[0].settings,
        validation={
            "plm_nll": inputs.plm_nll,
            "mixture_nll": policy.nll,
            "coverage": (inputs.validation.data.label_N >= 0).float().mean().item(),
        },
        memory_digest=memories.train.digest,
    )
    return TrainedAdapter(card, network_of(members), inputs.stats.candidate_ids_C, head, pairs)


def _require_shared(settings: TrainingSettings, memories: Memories) -> None:
    if settings.retrieved_examples and not memories.shows_targets:
        raise InvalidData(
            "Examples in a prompt show pairs to the PLM's owner, and the targets of this memory are private, or are "
            "redacted JSON.",
            hint="Use --retrieved-examples 0, or build the memory with --share-targets.",
        )

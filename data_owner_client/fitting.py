"""Training as a user asks for it: memories and a server in; an adapter, and what was chosen for it, out."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import Tensor

from data_owner_client import plotting
from data_owner_client.adapter import AdapterCard, AdapterForm, TrainedAdapter
from data_owner_client.candidates import places, token_set
from data_owner_client.data import digest_pairs
from data_owner_client.decoding.gate import Gate, nll_on_unseen
from data_owner_client.decoding.interpolation import Interpolation
from data_owner_client.decoding.rounds import DecodingSettings
from data_owner_client.evaluation import both_sides, plm_target_logprobs, text_scores
from data_owner_client.files import write_atomically
from data_owner_client.generation import translate
from data_owner_client.memory import ExternalMemory, MemoryRows
from data_owner_client.memory.build import encode_all, tokenize_pair
from data_owner_client.memory.store import TRAIN, VALIDATION, MemoryPlan, ModelIdentity
from data_owner_client.nearest import NearestPairs, with_examples
from data_owner_client.peak_memory import peak_rss_mb
from data_owner_client.plm import RemotePlm
from data_owner_client.progress import Reporter
from data_owner_client.training import (
    Aligned,
    Sharded,
    Survey,
    Trained,
    TrainingSettings,
    ValidationData,
    likeliest_interpolations,
    train_adapter,
    tune,
)
from protocol.errors import InvalidData
from protocol.head import LMHead

# In the adapter's folder, until it is done.
_CHECKPOINTS = ".training-"
# Examples of its own for every prompt, where the user does not say how many.
NEAREST = 5
# Interpolations that are decoded besides the likeliest.
_TO_DECODE = [Interpolation(schedule="constant", lambda_max=value) for value in (0.3, 0.5, 0.7, 0.85)]
REPORT = "training.json"


class Option(BaseModel):
    """A way to use the adapter, as it did on the held-out pairs.

    Attributes:
        nearest: examples that each prompt of the PLM has for itself; 0 for those of the task.
        interpolation: with the PLM.
        nll: of the mixture, in nats per token.
        chrf: of decoded texts, where this option was decoded.
    """

    nearest: int
    interpolation: Interpolation
    nll: float
    chrf: float | None = None

    def __str__(self) -> str:
        """In words."""
        prompts = f", prompts with {self.nearest} examples of their own" if self.nearest else ""
        return f"{self.interpolation}{prompts}"


class Trial(BaseModel):
    """Settings that were tried, and the validation loss with them (at the best constant λ, in nats per token)."""

    settings: dict[str, bool | int | float | str | None]
    nll: float


class TrainingReport(BaseModel):
    """What `train` made; it lies as `training.json` beside the adapter.

    Attributes:
        trials: all trainings, in their order.
        options: what was tried on the held-out pairs, the chosen one first.
        peak_rss_mb: largest resident memory of this process so far.
    """

    folder: str
    card: AdapterCard
    history: list[dict[str, float | int | str | None]]
    trials: list[Trial]
    options: list[Option]
    seconds: float
    peak_rss_mb: float


def train(
    plm: RemotePlm,
    memory: Path,
    folder: Path,
    *,
    settings: TrainingSettings | None = None,
    reporter: Reporter | None = None,
) -> tuple[TrainedAdapter, TrainingReport]:
    """Train an adapter on the memories that `build_memories` made; write it, its report and a picture into `folder`.

    The server is asked for the head rows of the candidate vocabulary only, unless the full one is wanted. How the
    adapter is used is chosen on the validation memory, first by likelihood: schedule and λ_max, or a learned gate, and,
    where the targets were shared, whether the PLM sees examples of its own for each text. Then some of the texts are
    decoded with that and with constant values of λ, and the one with the highest chrF stays.

    The memory is read from disk as it is needed, so it may be larger than RAM. Interrupted, the same call goes on where
    it was, to the same adapter.

    Raises:
        InvalidData: a memory is missing, incomplete or damaged, or does not allow these settings.
        IdentityMismatch: the memory was built with another model.
        InvalidRequest: there is no such device.
        NumericalFault: the loss is no longer finite.
    """
    started = time.perf_counter()
    reporter = reporter or Reporter()
    memories = Memories.open(memory, plm)
    plan = memories.plan
    settings = settings or TrainingSettings()
    forms: list[AdapterForm] = [] if settings.form else ["paper"]
    if forms and plan.model.cr_kind == "last_hidden_state":
        forms += ["residual", "recent"]
    settings = with_form(settings, plan)
    _require_shared(settings, plan)
    rows = memories.rows(settings)
    survey = Survey.of(rows)
    if settings.full_vocabulary:
        survey = replace(survey, candidate_ids_C=torch.arange(plan.model.vocab_size))
    targets = Targets.fetch(plm, survey.candidate_ids_C, memories.validation, reporter)
    held_out = memories.rows_held_out(settings)
    validation = ValidationData.of(
        held_out, survey.candidate_ids_C, targets.plm_logprobs(held_out), memories.train.length_ratio
    )

    def fit(tried: TrainingSettings) -> Trained:
        # Settings that were tried before an interruption are done at once.
        name = hashlib.sha256(json.dumps(asdict(tried)).encode()).hexdigest()[:16]
        return train_adapter(
            rows,
            survey,
            targets.candidates,
            validation,
            tried,
            checkpoint=folder / f"{_CHECKPOINTS}{name}.safetensors",
            identity=[memories.train.digest, memories.validation.digest, plan.model.model_dump()],
            reporter=reporter,
        )

    trials: list[Trial] = []

    def on_trial(tried: TrainingSettings, nll: float) -> None:
        trials.append(Trial(settings=asdict(tried), nll=nll))
        if tried.minutes:
            words = f"{tried.form}, rank {tried.rank}, κ {tried.kappa}, learning rate {tried.learning_rate}"
            reporter.say(f"Tried {words}, dropout {tried.dropout}: {nll:.4f} nats per token.")

    settings, trained = tune(settings, fit, forms=forms, on_trial=on_trial)
    plm_nll = -validation.plm_logprob_N.mean().item()

    def made(option: Option, why: str) -> TrainedAdapter:
        pairs = memories.train.pairs() if option.nearest else []
        card = AdapterCard(
            model=plan.model,
            task=plan.task,
            context_mode=plan.context_mode,
            form=trained.adapter.form,
            rank=trained.adapter.A.out_features,
            candidates=len(survey.candidate_ids_C),
            length_ratio=memories.train.length_ratio,
            mean_length=memories.train.manifest.rows / memories.train.manifest.examples,
            nearest=option.nearest,
            pairs_digest=digest_pairs(pairs) if pairs else "",
            interpolation=option.interpolation,
            interpolation_why=why,
            logit_scale=targets.candidates.logit_scale,
            softcap=targets.candidates.softcap,
            settings=asdict(settings),
            validation={
                "plm_nll": plm_nll,
                "mixture_nll": option.nll,
                "coverage": (validation.data.label_N >= 0).float().mean().item(),
            },
            memory_digest=memories.train.digest,
        )
        return TrainedAdapter(card, trained.adapter, survey.candidate_ids_C, targets.candidates, pairs)

    plain = made(Option(nearest=0, interpolation=Interpolation(), nll=0.0), "")
    options = _likeliest(plm, memories, settings, targets, plain, validation, held_out, reporter)
    if settings.decoded:
        options = _best_decoded(plm, memories, settings.decoded, made(options[0], ""), options, reporter)
    best = options[0]
    why = f"{best}: {best.nll:.3f} nats per token of the validation examples (the PLM alone: {plm_nll:.3f})"
    why += "" if best.chrf is None else f", chrF {best.chrf:.1f} on those that were decoded, the best of those tried"
    reporter.say(f"Chosen: {why}.")
    adapter = made(best, why)
    adapter.save(folder)
    plotting.training(trained.history, plm_nll, folder / "training.png")
    report = TrainingReport(
        folder=str(folder),
        card=adapter.card,
        history=[asdict(epoch) for epoch in trained.history],
        trials=trials,
        options=options,
        seconds=time.perf_counter() - started,
        peak_rss_mb=peak_rss_mb(),
    )
    write_atomically(folder / REPORT, report.model_dump_json(indent=1).encode())
    # Also what a kill may have left of one.
    for path in [*folder.glob(f"{_CHECKPOINTS}*"), *folder.glob(f".{_CHECKPOINTS}*.partial")]:
        path.unlink(missing_ok=True)
    return adapter, report


@dataclass(frozen=True)
class Memories:
    """The memory to train on, and the one to validate on."""

    train: ExternalMemory
    validation: ExternalMemory

    @classmethod
    def open(cls, folder: Path, plm: RemotePlm) -> Memories:
        """Both, if they are complete and of the server's model."""
        both = cls(ExternalMemory(folder / TRAIN), ExternalMemory(folder / VALIDATION))
        for part in (both.train, both.validation):
            part.manifest.plan.model.require(ModelIdentity.of(plm.card), f"The memory in {part.folder}", "the server")
            part.require_complete()
        return both

    @property
    def plan(self) -> MemoryPlan:
        """What both were built from, but for the pairs."""
        return self.train.manifest.plan

    def rows(self, settings: TrainingSettings) -> Sharded:
        """What to train on."""
        return Aligned(self.train) if settings.pairing == "aligned" else self.train

    def rows_held_out(self, settings: TrainingSettings) -> MemoryRows:
        """What to validate on."""
        rows = self.validation.load()
        return rows.aligned() if settings.pairing == "aligned" else rows


@dataclass(frozen=True)
class Targets:
    """The LM head's rows of all tokens that occur in the targets of either memory.

    Attributes:
        ids_K: int64, sorted.
        head: of these tokens, float32.
        candidates: of those that occur in the memory that is trained on.
    """

    ids_K: Tensor
    head: LMHead
    candidates: LMHead

    @classmethod
    def fetch(cls, plm: RemotePlm, candidate_ids_C: Tensor, validation: ExternalMemory, reporter: Reporter) -> Targets:
        """One request for both memories: the server need not know which tokens are those of the few held-out texts."""
        ids_K = token_set([candidate_ids_C, *(rows.target_N for rows in validation.shards())])
        if len(ids_K) == plm.card.vocab_size:
            head = plm.full_head(reporter).to(torch.float32)
        else:
            reporter.say(
                "Leaves this machine: which tokens occur anywhere in the targets, as their LM-head rows are asked for."
            )
            head = plm.head_rows(ids_K)
        same = len(candidate_ids_C) == len(ids_K)
        return cls(ids_K, head, head if same else head.rows(places(candidate_ids_C, ids_K)))

    def plm_logprobs(self, rows: MemoryRows) -> Tensor:
        """log P_PLM(y) of each row, float64."""
        return plm_target_logprobs(self.head, self.ids_K, rows)


def _likeliest(
    plm: RemotePlm,
    memories: Memories,
    settings: TrainingSettings,
    targets: Targets,
    adapter: TrainedAdapter,
    validation: ValidationData,
    held_out: MemoryRows,
    reporter: Reporter,
) -> list[Option]:
    """The likeliest interpolations, the best first: of every schedule, and of a gate, with every kind of prompt."""

    def options(nearest: int, data: ValidationData, plm_rows: MemoryRows) -> list[Option]:
        pema_logprob_N, features_N_F = both_sides(adapter, data, plm_rows)
        found = [
            Option(nearest=nearest, interpolation=each, nll=data.mixture_nll(pema_logprob_N, each))
            for each in dict.fromkeys([*likeliest_interpolations(data, pema_logprob_N), *_TO_DECODE])
        ]
        if settings.gate:
            sides = features_N_F, data.plm_logprob_N, pema_logprob_N
            nll, mean_lambda = nll_on_unseen(*sides, data.position_N)
            gated = Interpolation(schedule="constant", lambda_max=mean_lambda, gate=Gate.fit(*sides))
            found.append(Option(nearest=nearest, interpolation=gated, nll=nll))
        return found

    found, count = options(0, validation, held_out), settings.nearest
    if count != 0 and memories.plan.context_mode == "teacher-forced":
        rows = _encode_with_nearest(plm, memories, count or NEAREST, reporter)
        near = replace(validation, plm_logprob_N=targets.plm_logprobs(rows))
        own = options(count or NEAREST, near, rows)
        found = [*own, *found] if count is None else own
    return sorted(found, key=lambda option: option.nll)


def _best_decoded(
    plm: RemotePlm,
    memories: Memories,
    most_texts: int,
    adapter: TrainedAdapter,
    options: list[Option],
    reporter: Reporter,
) -> list[Option]:
    """The options, the one with the highest chrF first: some held-out texts are decoded with the likeliest and others.

    Likelihood takes the texts before each token as given, so its λ is not always the best for whole texts.
    """
    pairs, likeliest = memories.validation.pairs()[:most_texts], options[0]
    others = [o for o in options[1:] if o.nearest == likeliest.nearest and o.interpolation in _TO_DECODE]
    # Twice the longest target: who goes on after that is wrong in any case.
    longest = max(int(rows.rows_E.max()) for rows in memories.validation.shards())
    decoding = DecodingSettings(max_new_tokens=2 * longest)
    sources, scored = [pair.source for pair in pairs], list[Option]()
    for option in [likeliest, *others]:
        result = translate(
            plm,
            sources,
            adapter=adapter,
            interpolation=option.interpolation,
            decoding=decoding,
            reporter=reporter,
        )
        chrf = text_scores(result.texts, [pair.target or "" for pair in pairs]).chrf
        reporter.say(f"{option}: chrF {chrf:.1f} on {len(pairs)} validation texts.")
        scored.append(option.model_copy(update={"chrf": chrf}))
    rest = [option for option in options[1:] if option not in others]
    return [*sorted(scored, key=lambda option: -(option.chrf or 0.0)), *rest]


def _encode_with_nearest(plm: RemotePlm, memories: Memories, count: int, reporter: Reporter) -> MemoryRows:
    """The held-out pairs behind prompts with examples of their own."""
    pairs, task = memories.validation.pairs(), memories.plan.task
    examples = NearestPairs(memories.train.pairs(), count).examples([pair.source for pair in pairs])
    tokenized = [
        tokenize_pair(plm, with_examples(plm, task, pair.source, own), pair, place=f"validation pair {number}")
        for number, (pair, own) in enumerate(zip(pairs, examples, strict=True), 1)
    ]
    rows = encode_all(plm, tokenized, reporter)
    if not torch.equal(rows.target_N, torch.cat([part.target_N for part in memories.validation.shards()])):
        raise InvalidData(
            "The targets are other tokens behind prompts with examples of their own.", hint="Use --nearest 0."
        )
    return rows


def _require_shared(settings: TrainingSettings, plan: MemoryPlan) -> None:
    if settings.nearest and plan.context_mode == "private":
        raise InvalidData(
            "Examples in a prompt show pairs to the PLM's owner, and the targets of this memory are private.",
            hint="Use --nearest 0, or build the memory with --share-targets.",
        )


def with_form(settings: TrainingSettings, plan: MemoryPlan) -> TrainingSettings:
    """Settings with the form that suits a memory, if they have none.

    Raises:
        InvalidData: they have one that does not.
    """
    in_head_space = plan.model.cr_kind == "last_hidden_state"
    if settings.form not in (None, "paper") and not in_head_space:
        raise InvalidData(
            f"The form {settings.form} adds to the LM head's input, and this memory holds {plan.model.cr_kind}.",
            hint="Use --form paper.",
        )
    best: AdapterForm = "recent" if plan.context_mode == "private" else "residual"
    return replace(settings, form=settings.form or (best if in_head_space else "paper"))

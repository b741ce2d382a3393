"""The verb `train`: settings and usage chosen, the adapter and its report written."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel

from data_owner_client.adapter.card import AdapterCard
from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.adapter.types import AdapterForm
from data_owner_client.data.pairs import digest_pairs
from data_owner_client.memory.manifest import MemoryPlan
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.atomic_files import write_atomically
from data_owner_client.runtime.memory_usage import peak_rss_mb
from data_owner_client.runtime.progress import Reporter
from data_owner_client.training.decoding_policy import DecodingPolicy, select_decoding_policy
from data_owner_client.training.inputs import Memories, TrainingInput, resolve_settings
from data_owner_client.training.plots import plot_training
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.settings_search import search_settings
from data_owner_client.training.trainer import Trained
from protocol.errors import InvalidData

# In the adapter's folder, until it is done.
_CHECKPOINTS = ".training-"
REPORT = "training.json"


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
    options: list[DecodingPolicy]
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
    decoded with that and with constant values of λ, and the one with the highest chrF stays; with a length
    reward only where that is clearly better.

    The memory is read from disk as it is needed, so it may be larger than RAM. Interrupted, the same call goes on where
    it was, to the same adapter, bit for bit. (But for a gate behind examples for each text: it is fitted to answers
    that the server computes anew, so it is the same up to their rounding.)

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
    openings = resolve_settings(settings, plan)
    _require_shared(settings, plan)
    given = TrainingInput.of(plm, memories, settings, reporter)

    def fit(tried: TrainingSettings) -> Trained:
        # Settings that were tried before an interruption are done at once.
        name = hashlib.sha256(json.dumps(asdict(tried)).encode()).hexdigest()[:16]
        return given.fit(tried, folder / f"{_CHECKPOINTS}{name}.safetensors", reporter)

    trials: list[Trial] = []

    def on_trial(tried: TrainingSettings, nll: float) -> None:
        trials.append(Trial(settings=asdict(tried), nll=nll))
        if tried.minutes or len(openings) > 1:
            words = f"{tried.form}, rank {tried.rank}, κ {tried.kappa}, learning rate {tried.learning_rate}"
            words += f", dropout {tried.dropout}" + (f", pairing {tried.pairing}" if len(openings) > 1 else "")
            reporter.say(f"Tried {words}: {nll:.4f} nats per token.")

    settings, trained = search_settings(openings, fit, forms=forms, on_trial=on_trial)

    def made(option: DecodingPolicy, why: str = "") -> TrainedAdapter:
        pairs = memories.train_pairs if option.nearest else []
        card = AdapterCard(
            model=plan.model,
            task=plan.task,
            context_mode=plan.context_mode,
            form=trained.adapter.form,
            rank=trained.adapter.A.out_features,
            candidates=len(given.survey.candidate_ids_C),
            length_ratio=memories.train.length_ratio,
            mean_length=memories.train.manifest.rows / memories.train.manifest.examples,
            nearest=option.nearest,
            pairs_digest=digest_pairs(pairs) if pairs else "",
            interpolation=option.interpolation,
            interpolation_why=why,
            logit_scale=given.targets.candidates.logit_scale,
            softcap=given.targets.candidates.softcap,
            settings=asdict(settings),
            validation={
                "plm_nll": given.plm_nll,
                "mixture_nll": option.nll,
                "coverage": (given.validation.data.label_N >= 0).float().mean().item(),
            },
            memory_digest=memories.train.digest,
        )
        return TrainedAdapter(card, trained.adapter, given.survey.candidate_ids_C, given.targets.candidates, pairs)

    options = select_decoding_policy(plm, memories, given, settings, made, reporter)
    best = options[0]
    why = f"{best}: {best.nll:.3f} nats per token of the validation examples (the PLM alone: {given.plm_nll:.3f})"
    if best.chrf is not None:
        why += f", chrF {best.chrf:.1f} on those that were decoded"
    reporter.say(f"Chosen: {why}.")
    adapter = made(best, why)
    adapter.save(folder)
    plot_training(trained.history, given.plm_nll, folder / "training.png")
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


def _require_shared(settings: TrainingSettings, plan: MemoryPlan) -> None:
    if settings.nearest and plan.context_mode == "private":
        raise InvalidData(
            "Examples in a prompt show pairs to the PLM's owner, and the targets of this memory are private.",
            hint="Use --nearest 0, or build the memory with --share-targets.",
        )

"""What a training looks at: both memories, their rows, and the LM head's rows of all their targets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from data_owner_client.adapter.types import AdapterForm
from data_owner_client.adapter.candidates import index_of, token_set
from data_owner_client.data.pairs import Pair
from data_owner_client.memory.manifest import MemoryPlan
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.memory.store import TRAIN, VALIDATION, ExternalMemory
from data_owner_client.plm.head_recovery.fit import fit_rows
from data_owner_client.plm.identity import ModelIdentity
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter
from data_owner_client.training.batches import FirstExamples, MemoryStats, ReliableRows, ShardSource, ShardView
from data_owner_client.training.head_distributions import fetch_distributions
from data_owner_client.training.likelihood import plm_target_logprobs
from data_owner_client.training.settings import Pairing, TrainingSettings
from data_owner_client.training.trainer import Trained, train_adapter
from data_owner_client.training.validation import ValidationData
from protocol.errors import InvalidData
from protocol.head import LMHead


@dataclass(frozen=True)
class Memories:
    """The memory to train on, and the one to validate on, which is small."""

    train: ExternalMemory
    validation: ExternalMemory

    @classmethod
    def open(cls, folder: Path, plm: RemotePlm) -> Memories:
        """Both.

        Raises:
            InvalidData: one is missing, incomplete or damaged.
            IdentityMismatch: they were built with another model.
        """
        both = cls(ExternalMemory(folder / TRAIN), ExternalMemory(folder / VALIDATION))
        for part in (both.train, both.validation):
            part.manifest.plan.model.require(
                ModelIdentity.from_card(plm.card), f"The memory in {part.folder}", "the server"
            )
            part.require_complete()
        return both

    @property
    def plan(self) -> MemoryPlan:
        """What both were built from, but for the pairs."""
        return self.train.manifest.plan

    @property
    def identity(self) -> list[object]:
        """What of the data decides a training."""
        return [self.train.digest, self.validation.digest, self.plan.model.model_dump()]

    @cached_property
    def train_pairs(self) -> list[Pair]:
        """The texts of the memory to train on."""
        return self.train.pairs()

    @cached_property
    def held_out_pairs(self) -> list[Pair]:
        """The texts of the memory to validate on."""
        return self.validation.pairs()

    @cached_property
    def held_out(self) -> MemoryRows:
        """The rows to validate on, as they lie on disk."""
        return self.validation.load()


@dataclass(frozen=True)
class TargetVocabulary:
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
    def fetch(
        cls, plm: RemotePlm, candidate_ids_C: Tensor, held_out: MemoryRows, reporter: Reporter
    ) -> TargetVocabulary:
        """One request for both memories: the server need not know which tokens are those of the few held-out texts."""
        ids_K = token_set([candidate_ids_C, held_out.target_N])
        if len(ids_K) == plm.card.vocab_size:
            head = plm.full_head(reporter).to(torch.float32)
        elif plm.card.head_policy == "none":
            fitted = fit_rows(plm.cached_distributions(), ids_K)
            reporter.say(f"{fitted}.")
            head = fitted.head
        else:
            reporter.say(
                "Leaves this machine: which tokens occur anywhere in the targets, as their LM-head rows are asked for."
            )
            head = plm.head_rows(ids_K)
        same = len(candidate_ids_C) == len(ids_K)
        return cls(ids_K, head, head if same else head.rows(index_of(candidate_ids_C, ids_K)))

    def plm_logprobs(self, rows: MemoryRows) -> Tensor:
        """log P_PLM(y) of each row, float64."""
        return plm_target_logprobs(self.head, self.ids_K, rows)


@dataclass(frozen=True)
class TrainingInput:
    """Rows, candidates and head rows, ready to train on.

    Attributes:
        identity: of all that decides a training, but for its settings.
        held_out: the rows of `validation`, and those whose contexts are not reliable.
    """

    identity: list[object]
    rows: ShardSource
    survey: MemoryStats
    targets: TargetVocabulary
    held_out: MemoryRows
    validation: ValidationData

    @classmethod
    def of(
        cls,
        plm: RemotePlm,
        memories: Memories,
        settings: TrainingSettings,
        reporter: Reporter,
        *,
        examples: int | None = None,
    ) -> TrainingInput:
        """Read what the settings ask for, and fetch the head's rows.

        Args:
            plm: gives the head's rows of the candidates only, unless the full vocabulary is wanted; or, under the
                policy `none`, the distributions that they are worked out from.
            memories: where the rows are.
            settings: of these, the pairing, the vocabulary and the distributions count.
            reporter: told what leaves this machine.
            examples: train on the memory's first so many; None for all.

        Raises:
            InvalidData: a memory is damaged, has no rows, or has fewer examples.
        """
        view = MemoryRows.paired_by_position if settings.pairing == "by_position" else MemoryRows.aligned
        rows: ShardSource = ShardView(memories.train, view)
        identity = memories.identity
        if examples is not None:
            if examples > memories.train.manifest.examples:
                raise InvalidData(
                    f"The memory has {memories.train.manifest.examples} examples, not {examples}.",
                    hint="Give fewer --examples.",
                )
            rows = FirstExamples(rows, memories.train.shard_examples, examples)
            identity = [*identity, examples]
        survey = MemoryStats.of(rows)
        if settings.full_vocabulary:
            survey = replace(survey, candidate_ids_C=torch.arange(memories.plan.model.vocab_size))
        if plm.card.head_policy == "none" and not settings.full_vocabulary:
            given = fetch_distributions(plm, memories.plan, memories.train_pairs, settings.distributions, reporter)
            identity = [*identity, given.digest]  # with more of them, the rows are others
        targets = TargetVocabulary.fetch(plm, survey.candidate_ids_C, memories.held_out, reporter)
        held_out = view(memories.held_out).only_reliable_match()
        validation = ValidationData.of(
            held_out, survey.candidate_ids_C, targets.plm_logprobs(held_out), memories.train.length_ratio
        )
        return cls(identity, rows, survey, targets, held_out, validation)

    @cached_property
    def _reliable(self) -> ReliableRows:
        """Counted once, however many trainings take them."""
        return ReliableRows(self.rows)

    @property
    def plm_nll(self) -> float:
        """Of the held-out targets under the PLM alone, in nats per token."""
        return -self.validation.plm_logprob_N.mean().item()

    def fit(self, settings: TrainingSettings, checkpoint: Path, reporter: Reporter) -> Trained:
        """Train; stopped and called again with the same checkpoint, go on where it was."""
        return train_adapter(
            self._reliable if settings.pairing == "reliable" else self.rows,
            self.survey,
            self.targets.candidates,
            self.validation,
            settings,
            checkpoint=checkpoint,
            identity=self.identity,
            reporter=reporter,
        )


def resolve_settings(settings: TrainingSettings, plan: MemoryPlan) -> list[TrainingSettings]:
    """The settings to begin with: what they leave open, pairing and form, as it suits a memory.

    For a private memory that is several, one for each pairing.

    Raises:
        InvalidData: the form does not suit the memory or the pairing.
    """
    in_head_space, is_private = plan.model.cr_kind == "last_hidden_state", plan.context_mode == "private"
    if settings.form not in (None, "paper") and not in_head_space:
        raise InvalidData(
            f"The form {settings.form} adds to the LM head's input, and this memory holds {plan.model.cr_kind}.",
            hint="Use --form paper.",
        )
    if not settings.makes_sense:
        raise InvalidData(
            "The form recent makes up for contexts that are not the true ones, and the pairing reliable has none of "
            "these.",
            hint="Use --form residual, or --pairing aligned.",
        )
    pairings: list[Pairing] = ["aligned", "reliable"] if is_private else ["aligned"]
    found = []
    for pairing in [settings.pairing] if settings.pairing else pairings:
        best: AdapterForm = "recent" if is_private and pairing == "aligned" else "residual"
        form = settings.form or (best if in_head_space else "paper")
        found.append(replace(settings, form=form, pairing=pairing))
    return [each for each in found if each.makes_sense]

"""Inputs of a training: both memories, their rows, and the LM-head rows of all their targets."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from data_owner_client.adapter.candidates import index_of, token_set
from data_owner_client.adapter.types import AdapterForm
from data_owner_client.data.example_retrieval import ExampleRetriever
from data_owner_client.data.pairs import Pair
from data_owner_client.memory.manifest import MemoryPlan
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.memory.store import TRAIN, VALIDATION, ExternalMemory
from data_owner_client.plm.head_recovery.fit import fit_rows
from data_owner_client.plm.identity import ModelIdentity
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.plm.tokenizer import PlmTokenizer
from data_owner_client.runtime.progress import Reporter
from data_owner_client.scoring.scorer import Scorer
from data_owner_client.scoring.scorers import references_of, scorer_for
from data_owner_client.training.batches import FirstExamples, MemoryStats, ReliableRows, ShardSource, ShardView
from data_owner_client.training.head_distributions import fetch_distributions
from data_owner_client.training.likelihood import plm_target_logprobs
from data_owner_client.training.settings import Pairing, TrainingSettings
from data_owner_client.training.trainer import Trained, estimate_seconds, train_adapter
from data_owner_client.training.validation import ValidationData
from protocol.errors import InvalidData
from protocol.head import LMHead


@dataclass(frozen=True)
class Memories:
    """The memory to train on, the smaller one to validate on, and the tokenizer of their model."""

    train: ExternalMemory
    validation: ExternalMemory
    tokenizer: PlmTokenizer

    @classmethod
    def open(cls, folder: Path, plm: RemotePlm) -> Memories:
        """Open both memories of a folder.

        Raises:
            InvalidData: a memory is missing, incomplete or damaged.
            IdentityMismatch: a memory was built with another model.
        """
        memories = cls(ExternalMemory(folder / TRAIN), ExternalMemory(folder / VALIDATION), plm.tokenizer)
        for part in (memories.train, memories.validation):
            part.manifest.plan.model.require(
                ModelIdentity.from_card(plm.card), f"The memory in {part.folder}", "the server"
            )
            part.require_complete()
        return memories

    @property
    def plan(self) -> MemoryPlan:
        """The plan that both memories share, except for the pairs."""
        return self.train.manifest.plan

    @property
    def identity(self) -> list[object]:
        """Digests of everything in the data that decides a training."""
        return [self.train.digest, self.validation.digest, self.plan.model.model_dump()]

    @cached_property
    def train_pairs(self) -> Sequence[Pair]:
        """Texts of the memory to train on."""
        return self.train.pairs()

    @cached_property
    def shown_train_pairs(self) -> Sequence[Pair]:
        """Texts of the memory to train on, as prompts may show them: with surrogates if the memory is redacted."""
        shown = self.train.shown_pairs()
        return self.train_pairs if shown is None else shown

    @cached_property
    def shown_held_out_pairs(self) -> Sequence[Pair]:
        """Texts of the memory to validate on, as prompts may show them: with surrogates if the memory is redacted."""
        shown = self.validation.shown_pairs()
        return self.held_out_pairs if shown is None else shown

    @property
    def shows_targets(self) -> bool:
        """True if prompts may show targets of the memory as examples."""
        mode, kind = self.plan.context_mode, self.plan.task.kind
        # JSON with surrogates may violate its schema, and be no example.
        return mode == "teacher-forced" or (mode == "redacted" and kind != "extract")

    @cached_property
    def retriever(self) -> Callable[[int], ExampleRetriever]:
        """The retriever of training pairs by the number of examples for a text; each is fitted once."""
        return cache(partial(ExampleRetriever, self.shown_train_pairs))

    @cached_property
    def held_out_pairs(self) -> Sequence[Pair]:
        """Texts of the memory to validate on."""
        return self.validation.pairs()

    @cached_property
    def scorer(self) -> Scorer:
        """The scorer of answers to the held-out texts."""
        task = self.plan.task
        return scorer_for(task, [references_of(pair, task, self.tokenizer) for pair in self.held_out_pairs])

    @cached_property
    def held_out(self) -> MemoryRows:
        """Rows to validate on, as they are on disk."""
        return self.validation.load()


@dataclass(frozen=True)
class TargetVocabulary:
    """The LM head's rows of all tokens that occur in the targets of either memory.

    Attributes:
        ids_U: int64, sorted: the U token ids that occur in either memory.
        head: float32 LM-head rows of these tokens.
        candidates: float32 LM-head rows of the tokens that occur in the training memory.
    """

    ids_U: Tensor
    head: LMHead
    candidates: LMHead

    @classmethod
    def fetch(
        cls, plm: RemotePlm, candidate_ids_C: Tensor, held_out: MemoryRows, reporter: Reporter
    ) -> TargetVocabulary:
        """Fetch the rows in one request for both memories, so the server cannot tell the held-out texts' tokens."""
        ids_U = token_set([candidate_ids_C, held_out.target_N])
        if len(ids_U) == plm.card.vocab_size:
            head = plm.full_head(reporter).to(torch.float32)
        elif plm.card.head_policy == "none":
            fit = fit_rows(plm.cached_distributions(), ids_U)
            reporter.say(f"{fit}.")
            head = fit.head
        else:
            reporter.say(
                "Leaves this machine: which tokens occur anywhere in the targets, as their LM-head rows are requested."
            )
            head = plm.head_rows(ids_U)
        all_are_candidates = len(candidate_ids_C) == len(ids_U)
        return cls(ids_U, head, head if all_are_candidates else head.rows(index_of(candidate_ids_C, ids_U)))

    def plm_logprobs(self, rows: MemoryRows) -> Tensor:
        """log P_PLM(y) of each row, float64."""
        return plm_target_logprobs(self.head, self.ids_U, rows)


@dataclass(frozen=True)
class TrainingInput:
    """Rows, candidates and head rows, ready to train on.

    Attributes:
        identity: digests of everything that decides a training, except its settings.
        rows: rows of the training memory, as the pairing shows them.
        stats: statistics of these rows.
        targets: LM-head rows of all targets.
        held_out: all held-out rows, those without a reliable context included.
        validation: the held-out rows whose contexts are reliable.
    """

    identity: list[object]
    rows: ShardSource
    stats: MemoryStats
    targets: TargetVocabulary
    held_out: MemoryRows
    validation: ValidationData

    @classmethod
    def from_memories(
        cls,
        plm: RemotePlm,
        memories: Memories,
        settings: TrainingSettings,
        reporter: Reporter,
        *,
        examples: int | None = None,
    ) -> TrainingInput:
        """Read the memories and fetch LM-head rows.

        Args:
            plm: gives the LM-head rows of the candidates, or of the full vocabulary if the settings say so. Under the
                policy `none` it gives the distributions from which they are recovered.
            memories: both memories.
            settings: settings, of which the pairing, the vocabulary and the number of distributions are used.
            reporter: shows what leaves this machine.
            examples: number of examples of the memory to train on, its first ones; None for all.

        Raises:
            InvalidData: a memory is damaged, has no rows, or has too few examples.
            PemaError: a call to the PLM failed.
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
        stats = MemoryStats.from_memory(rows)
        if settings.full_vocabulary:
            stats = replace(stats, candidate_ids_C=torch.arange(memories.plan.model.vocab_size))
        if plm.card.head_policy == "none" and not settings.full_vocabulary:
            distributions = fetch_distributions(
                plm,
                memories.plan,
                memories.train_pairs,
                settings.head_contexts,
                reporter,
                shown=memories.train.shown_pairs(),
            )
            identity = [*identity, distributions.digest]  # more distributions make other rows
        targets = TargetVocabulary.fetch(plm, stats.candidate_ids_C, memories.held_out, reporter)
        held_out = view(memories.held_out).only_reliable_match()
        validation = ValidationData.from_rows(
            held_out, stats.candidate_ids_C, targets.plm_logprobs(held_out), memories.train.length_ratio
        )
        return cls(identity, rows, stats, targets, held_out, validation)

    @cached_property
    def _reliable_rows(self) -> ReliableRows:
        """The rows with reliable contexts, counted once for all trainings."""
        return ReliableRows(self.rows)

    @property
    def plm_nll(self) -> float:
        """Loss of the held-out targets under the PLM alone, in nats per token."""
        return -self.validation.plm_logprob_N.mean().item()

    def estimate_seconds(self, settings: TrainingSettings, clock: Callable[[], float]) -> float:
        """The duration of a training with all its epochs on this machine, in seconds."""
        return estimate_seconds(self.rows, self.stats, self.targets.candidates, self.validation, settings, clock=clock)

    def fit(
        self,
        settings: TrainingSettings,
        checkpoint: Path,
        reporter: Reporter,
        clock: Callable[[], float] = time.monotonic,
    ) -> Trained:
        """Train an adapter; resume from the checkpoint if there is one of this training."""
        return train_adapter(
            self._reliable_rows if settings.pairing == "reliable" else self.rows,
            self.stats,
            self.targets.candidates,
            self.validation,
            settings,
            checkpoint=checkpoint,
            identity=self.identity,
            reporter=reporter,
            clock=clock,
        )


def resolve_settings(settings: TrainingSettings, plan: MemoryPlan) -> list[TrainingSettings]:
    """Settings to begin with: a copy for each pairing to try, with the form that suits the memory.

    A private memory has two pairings to try unless the settings name one.

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
    resolved = []
    for pairing in [settings.pairing] if settings.pairing else pairings:
        best: AdapterForm = "recent" if is_private and pairing == "aligned" else "residual"
        form = settings.form or (best if in_head_space else "paper")
        resolved.append(replace(settings, form=form, pairing=pairing))
    return [each for each in resolved if each.makes_sense]

"""Measurement of one point: memory, training, and likelihood of held-out targets behind their true contexts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import get_args

import torch
from pydantic import BaseModel
from torch import Tensor

from benchmarks.in_process import rows_of
from benchmarks.sensitivity.neighbours import with_neighbours
from benchmarks.sensitivity.points import Point
from benchmarks.sensitivity.redaction import a_quarter_of_words
from data_owner_client import Pair, Redaction, RemotePlm, Task, TrainedAdapter, build_memories, translate
from data_owner_client.adapter.candidates import token_set
from data_owner_client.adapter.ensemble import AdapterNetwork
from data_owner_client.adapter.interpolation import Interpolation, mix
from data_owner_client.adapter.types import Schedule
from data_owner_client.decoding.settings import DecodingSettings, Effort
from data_owner_client.memory.build_splits import task_of_memory
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.memory.types import ContextMode
from data_owner_client.runtime.progress import Reporter
from data_owner_client.scoring.scorers import references_of, scorer_for
from data_owner_client.training.inputs import Memories, TrainingInput
from data_owner_client.training.likelihood import plm_target_logprobs
from data_owner_client.training.member_selection import network_of, select_members
from data_owner_client.training.policies import DecodingPolicy
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.train import assemble_adapter
from data_owner_client.training.trainer import Trained
from data_owner_client.training.validation import LAMBDAS, ValidationData, target_logprobs

SCHEDULES: tuple[Schedule, ...] = tuple(name for name in get_args(Schedule) if name != "none")


class Measurement(BaseModel):
    """Result of one point. Losses are in nats per token of held-out targets behind their true contexts.

    Attributes:
        plm_nll: loss of the PLM alone.
        nll: loss of the mixture by schedule, with the λ_max that is likeliest on the validation memory.
        lambda_max: that λ_max by schedule.
        curves: loss of the mixture by schedule with each of `LAMBDAS`.
        standard_error: of the gain with constant λ over the choice of test texts, in nats per token.
        rows: rows of the training memory.
        candidates: number of candidate tokens.
        coverage: share of the held-out tokens that are candidates.
        epochs: passes over the memory, of both phases and all trainings together.
        seconds: duration of all trainings.
        scores: metrics of the answers to the test set, by title; None if it was not answered.
        headline: title of the metric that the task is judged by.
        rows_a_token: rows that the server computed, per token of the answers; None if they were not counted.
    """

    plm_nll: float
    nll: dict[str, float]
    lambda_max: dict[str, float]
    curves: dict[str, list[float]]
    standard_error: float
    rows: int
    candidates: int
    coverage: float
    epochs: int
    seconds: float
    scores: dict[str, float] | None = None
    headline: str = ""
    rows_a_token: float | None = None

    @property
    def gain(self) -> float:
        """Gain of the mixture with constant λ over the PLM, in nats per token."""
        return self.plm_nll - self.nll["constant"]


@dataclass(frozen=True)
class Splits:
    """Pairs of a task: as many as the largest memory has, and those that are held out."""

    train: Sequence[Pair]
    validation: Sequence[Pair]
    test: Sequence[Pair]


class Bench:
    """Measures points of one task and one model.

    Args:
        plm: the model.
        task: the task, with its in-context examples.
        splits: pairs of the task.
        folder: folder for memories.
        reporter: shows the progress.
    """

    def __init__(self, plm: RemotePlm, task: Task, splits: Splits, folder: Path, reporter: Reporter) -> None:
        self._plm, self._splits, self._folder, self._reporter = plm, splits, folder, reporter
        self._task = task_of_memory(task, plm.tokenizer, [splits.train, splits.validation])
        self._memories = cache(self._built)
        self._test_rows = cache(self._encoded)
        self._last: tuple[Point | None, dict[TrainingSettings, Trained]] = (None, {})

    def measure(self, point: Point) -> Measurement:
        """Train and measure a point; memories are built once."""
        memories = self._memories(point.context_mode)
        inputs = TrainingInput.from_memories(
            self._plm,
            memories,
            point.settings[0],
            self._reporter,
            examples=min(point.pairs, memories.train.manifest.examples),
        )
        trainings = self._fit(inputs, point)
        members = select_members(trainings, point.most_members, inputs.validation, inputs.targets.candidates)
        measurement = self._measured(inputs, network_of(members), trainings, memories, neighbours=point.neighbours)
        if point.schedule is None:
            return measurement
        interpolation = Interpolation(
            schedule=point.schedule, lambda_max=measurement.lambda_max.get(point.schedule, 0.0)
        )
        policy = DecodingPolicy(nearest=0, interpolation=interpolation, nll=0.0)
        adapter = assemble_adapter(memories, inputs, members, policy)
        return measurement.model_copy(update=self._scores(adapter, point.effort))

    def _fit(self, inputs: TrainingInput, point: Point) -> list[Trained]:
        """The trainings of a point, the likeliest first.

        Those of the last point are used again if only its number of trainings and its answers differ.
        """
        alike = replace(point, members=1, changes=0, neighbours=False, schedule=None, effort="low")
        if self._last[0] != alike:
            self._last = alike, {}
        known = self._last[1]
        for settings in point.settings:
            if settings not in known:
                checkpoint = self._folder / "checkpoint.safetensors"
                checkpoint.unlink(missing_ok=True)
                known[settings] = inputs.fit(settings, checkpoint, self._reporter)
                checkpoint.unlink(missing_ok=True)
        return sorted((known[settings] for settings in point.settings), key=lambda trained: trained.best_nll)

    def _scores(self, adapter: TrainedAdapter, effort: Effort) -> dict[str, object]:
        """Scores of the adapter's answers to the test set, by field of `Measurement`."""
        test, task = self._splits.test, adapter.card.task
        # Beams cannot be held to a form.
        decoding = DecodingSettings(hold=False if effort == "medium" else None)
        generation = translate(
            self._plm, [pair.question for pair in test], adapter=adapter, decoding=decoding, effort=effort
        )
        scorer = scorer_for(task, [references_of(pair, task, self._plm.tokenizer) for pair in test])
        scores = {scorer.metrics[key].title: value for key, value in scorer.scores(generation.texts).items()}
        rows = generation.stats.round_trips + generation.stats.drafted
        return {
            "scores": scores,
            "headline": scorer.metrics[scorer.headline].title,
            "rows_a_token": rows / sum(map(len, generation.choices)),
        }

    def _measured(
        self,
        inputs: TrainingInput,
        network: AdapterNetwork,
        trainings: Sequence[Trained],
        memories: Memories,
        *,
        neighbours: bool,
    ) -> Measurement:
        rows, plm_logprob_N = self._test_rows()
        test = ValidationData.from_rows(rows, inputs.stats.candidate_ids_C, plm_logprob_N, memories.train.length_ratio)
        head = inputs.targets.candidates
        held_out_N = target_logprobs(network, head, inputs.validation.data)
        pema_logprob_N = target_logprobs(network, head, test.data)
        if neighbours:
            held_out_N, pema_logprob_N = with_neighbours(memories.train, inputs, test, held_out_N, pema_logprob_N)
        chosen = {schedule: inputs.validation.best(held_out_N, schedule)[0] for schedule in SCHEDULES}
        constant_N = torch.full_like(plm_logprob_N, chosen["constant"].lambda_max)
        gain_N = mix(plm_logprob_N, pema_logprob_N, constant_N) - plm_logprob_N
        return Measurement(
            plm_nll=-plm_logprob_N.mean().item(),
            nll={schedule: test.mixture_nll(pema_logprob_N, each) for schedule, each in chosen.items()},
            lambda_max={schedule: each.lambda_max for schedule, each in chosen.items()},
            curves={
                schedule: [
                    test.mixture_nll(pema_logprob_N, Interpolation(schedule=schedule, lambda_max=value))
                    for value in LAMBDAS
                ]
                for schedule in SCHEDULES
            },
            standard_error=standard_error(gain_N, rows.rows_E),
            rows=sum(inputs.rows.shard_rows),
            candidates=len(inputs.stats.candidate_ids_C),
            coverage=(test.data.label_N >= 0).double().mean().item(),
            epochs=sum(len(trained.history) for trained in trainings),
            seconds=sum(trained.seconds for trained in trainings),
        )

    def _built(self, mode: ContextMode) -> Memories:
        folder = self._folder / f"memory-{mode}"
        build_memories(
            self._plm,
            self._task,
            self._splits.train,
            folder,
            validation=self._splits.validation,
            context_mode=mode,
            share_targets=mode == "teacher-forced",
            redaction=Redaction.from_function(a_quarter_of_words) if mode == "redacted" else None,
            skip_invalid=True,
            reporter=self._reporter,
        )
        return Memories.open(folder, self._plm)

    def _encoded(self) -> tuple[MemoryRows, Tensor]:
        """Rows of the test set, and log P_PLM of their targets."""
        rows = rows_of(self._plm, self._task, self._splits.test)
        ids_K = token_set([rows.target_N])
        return rows, plm_target_logprobs(self._plm.head_rows(ids_K), ids_K, rows)


def standard_error(value_N: Tensor, rows_E: Tensor) -> float:
    """Standard error of the mean over tokens of texts that were drawn as a whole: that of a ratio estimator.

    Args:
        value_N: a value of each token.
        rows_E: number of tokens of each text.
    """
    sum_E = torch.stack([part.sum() for part in value_N.split(rows_E.tolist())])
    deviation_E = sum_E - value_N.mean() * rows_E
    texts = len(rows_E)
    return math.sqrt(deviation_E.square().sum().item() * texts / max(1, texts - 1)) / len(value_N)

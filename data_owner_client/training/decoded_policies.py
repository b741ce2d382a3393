"""Held-out texts decoded with several policies, within a time budget, and stored for a call that goes on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError
from torch import Tensor

from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.runtime.atomic_files import write_atomically
from data_owner_client.scoring.scorer import Scorer
from data_owner_client.training.time_budget import MIN_TEXTS, TimeBudget

Decode = Callable[[Interpolation, int], list[str]]
"""Answers the first so many held-out texts with an interpolation."""


class DecodedTexts(BaseModel):
    """Texts of one policy, and the seconds that they took."""

    texts: list[str]
    seconds: float


@dataclass(frozen=True)
class ScoredPolicy:
    """Scores of one policy.

    Attributes:
        scores: scores of all texts together, by key of the metric.
        score_E: the scorer's headline metric of each text, float64.
    """

    scores: dict[str, float]
    score_E: Tensor


@dataclass(frozen=True)
class TextStore:
    """Decoded texts on disk.

    Attributes:
        stem: path that the files' names begin with.
        identity: everything besides the interpolation that decides the texts, as JSON.
    """

    stem: Path
    identity: object

    def load(self, interpolation: Interpolation, count: int) -> DecodedTexts | None:
        """The stored texts; None if the file is missing or damaged."""
        try:
            return DecodedTexts.model_validate_json(self._path(interpolation, count).read_bytes())
        except (OSError, ValidationError):
            return None

    def save(self, interpolation: Interpolation, decoded: DecodedTexts) -> None:
        """Store texts.

        Raises:
            InvalidData: the disk is full.
        """
        write_atomically(self._path(interpolation, len(decoded.texts)), decoded.model_dump_json().encode())

    def _path(self, interpolation: Interpolation, count: int) -> Path:
        record = json.dumps([self.identity, interpolation.model_dump(mode="json"), count])
        return self.stem.with_name(f"{self.stem.name}{hashlib.sha256(record.encode()).hexdigest()[:16]}.json")


class DecodedPolicies:
    """Scores of policies on the same held-out texts; each policy is decoded and scored once.

    The first policy shows how long one takes. If the others would not fit into the budget, all go on with fewer texts.

    Args:
        decode: decodes held-out texts.
        scorer: scores the texts.
        texts: number of held-out texts.
        policies: number of policies that are to be decoded.
        budget: a policy is decoded only if it should end within it.
        store: texts of an interrupted call.

    Attributes:
        texts: texts that all policies have in common.
        refused: number of policies for which there was no time.
    """

    def __init__(
        self, decode: Decode, scorer: Scorer, texts: int, *, policies: int, budget: TimeBudget, store: TextStore
    ) -> None:
        self.texts = texts
        self.refused = 0
        self._decode = decode
        self._scorer = scorer
        self._policies = policies
        self._budget = budget
        self._store = store
        self._scored: dict[Interpolation, ScoredPolicy] = {}
        self._text_seconds = 0.0

    @property
    def minutes_for_all(self) -> int:
        """Minutes of a budget that includes the policies which were refused."""
        used = self._budget.seconds - self._budget.left
        return math.ceil((used + self.refused * self.texts * self._text_seconds) / 60)

    def score(self, interpolation: Interpolation) -> ScoredPolicy | None:
        """Decode the texts and score them, unless that was done; None if there is no time for it."""
        if interpolation in self._scored:
            return self._scored[interpolation]
        decoded = self._store.load(interpolation, self.texts)
        if decoded is not None:
            self._budget.charge(decoded.seconds)
        elif self._text_seconds * self.texts > self._budget.left:
            self.refused += 1
            return None
        else:
            began = self._budget.clock()
            texts = self._decode(interpolation, self.texts)
            decoded = DecodedTexts(texts=texts, seconds=self._budget.clock() - began)
            self._store.save(interpolation, decoded)
        self._text_seconds = max(self._text_seconds, decoded.seconds / len(decoded.texts))
        if not self._scored:
            self._fit_texts()
        texts = decoded.texts[: self.texts]
        self._scored[interpolation] = ScoredPolicy(self._scorer.scores(texts), self._scorer.each(texts))
        return self._scored[interpolation]

    def _fit_texts(self) -> None:
        """Go on with as many texts as the other policies have time for, if these are enough to tell policies apart."""
        others = max(1, self._policies - 1)
        fitting = int(max(0.0, self._budget.left) / max(1e-9, others * self._text_seconds))
        if MIN_TEXTS <= fitting < self.texts:
            self.texts = fitting

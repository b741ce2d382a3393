"""Held-out texts decoded with several policies, within a time budget, and kept on disk for a call that goes on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError
from torch import Tensor

from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.runtime.atomic_files import write_atomically
from data_owner_client.scoring.text_metrics import TextScores, bleu_tokenizer, sentence_chrf, text_scores
from data_owner_client.training.time_budget import MIN_TEXTS, TimeBudget

Decode = Callable[[Interpolation, int], list[str]]
"""Decodes the first so many held-out texts with an interpolation."""


class DecodedTexts(BaseModel):
    """Texts of one policy, and the seconds that they took."""

    texts: list[str]
    seconds: float


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
    """Scores of policies on the same held-out texts; each policy is decoded once.

    The first policy shows how long one takes. If the others would not fit into the budget, all go on with fewer texts.

    Args:
        decode: decodes held-out texts.
        references: references of the held-out texts.
        policies: number of policies that are to be decoded.
        budget: a policy is decoded only if it should end within it.
        store: texts of an interrupted call.

    Attributes:
        refused: number of policies for which there was no time.
    """

    def __init__(
        self, decode: Decode, references: Sequence[str], *, policies: int, budget: TimeBudget, store: TextStore
    ) -> None:
        self._decode = decode
        self._references = list(references)
        self._tokenizer = bleu_tokenizer(references)
        self._policies = policies
        self._budget = budget
        self._store = store
        self._texts: dict[Interpolation, list[str]] = {}
        self._text_seconds = 0.0
        self.refused = 0

    @property
    def texts(self) -> int:
        """Texts that all policies have in common."""
        return len(self._references)

    @property
    def interpolations(self) -> list[Interpolation]:
        """The decoded policies, in their order."""
        return list(self._texts)

    @property
    def minutes_for_all(self) -> int:
        """Minutes of a budget that includes the policies which were refused."""
        used = self._budget.seconds - self._budget.left
        return math.ceil((used + self.refused * self.texts * self._text_seconds) / 60)

    def add(self, interpolation: Interpolation) -> bool:
        """Decode the texts, unless that was done; return False if there is no time for it."""
        if interpolation in self._texts:
            return True
        stored = self._store.load(interpolation, self.texts)
        if stored is not None:
            self._budget.charge(stored.seconds)
        elif self._text_seconds * self.texts > self._budget.left:
            self.refused += 1
            return False
        else:
            began = self._budget.clock()
            texts = self._decode(interpolation, self.texts)
            stored = DecodedTexts(texts=texts, seconds=self._budget.clock() - began)
            self._store.save(interpolation, stored)
        self._texts[interpolation] = stored.texts
        self._text_seconds = max(self._text_seconds, stored.seconds / len(stored.texts))
        if len(self._texts) == 1:
            self._fit_texts()
        return True

    def chrf_E(self, interpolation: Interpolation) -> Tensor:
        """Sentence-level chrF of each text with a decoded policy, float64."""
        return sentence_chrf(self._texts[interpolation][: self.texts], self._references)

    def scores(self, interpolation: Interpolation) -> TextScores:
        """Corpus scores of a decoded policy."""
        return text_scores(self._texts[interpolation][: self.texts], self._references, self._tokenizer)

    def _fit_texts(self) -> None:
        """Go on with as many texts as the other policies have time for, if these are enough to tell policies apart."""
        others = max(1, self._policies - 1)
        fitting = int(max(0.0, self._budget.left) / max(1e-9, others * self._text_seconds))
        if MIN_TEXTS <= fitting < self.texts:
            self._references = self._references[:fitting]

"""Bounds of a generated text, learned from the targets of a memory."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

# Of the targets, this share is within the spread.
_QUANTILE = 0.99
# The bound is this many times the spread away from the expected length. Three of the demo's 4,000 targets are longer,
# by two tokens at most. More room would be left to texts that do not end.
_ROOM = 1.25
# A small memory may show no spread at all. The number of tokens is a count: its variance is about its mean (Poisson).
_LEAST_DEVIATIONS = 2.0
# Repeated tokens that any text may have: the zeros of an identifier, a line of dashes, an emphatic word.
_LEAST_REPETITION = 16
# A text may repeat this many times what the longest repetition of the targets has.
_REPETITION_ROOM = 2

# Largest ratio and spread that a card may name: no text is a billion tokens long.
_MOST = 1e9

DEFAULT_REPETITION_LIMIT = _LEAST_REPETITION
"""Repeated tokens at which a text ends if no targets are known."""


class TextBounds(BaseModel):
    """Bounds of a generated text.

    A source text of S tokens has about r·S target tokens, and the deviation grows with √S, as that of a sum of
    independent tokens.

    Attributes:
        length_ratio: r, target tokens per source token of all targets.
        length_spread: the 99th percentile of the targets' deviations from r·S, in units of √S.
        longest_repetition: repeated tokens of the most repetitive target (`data.repetition`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    length_ratio: float = Field(gt=0, le=_MOST)
    length_spread: float = Field(ge=-_MOST, le=_MOST)
    longest_repetition: int = Field(ge=0)

    @classmethod
    def from_lengths(cls, rows_E: Tensor, source_tokens_E: Tensor, longest_repetition: int) -> TextBounds:
        """Learn from the lengths of targets, stop included, and of their source texts.

        Args:
            rows_E: target tokens.
            source_tokens_E: source tokens.
            longest_repetition: repeated tokens of the most repetitive target.
        """
        rows_E, source_E = rows_E.double(), source_tokens_E.double().clamp(min=1.0)
        ratio = float(rows_E.sum() / source_E.sum())
        deviation_E = (rows_E - ratio * source_E) / source_E.sqrt()
        spread = float(deviation_E.kthvalue(math.ceil(_QUANTILE * len(deviation_E))).values)
        return cls(length_ratio=ratio, length_spread=spread, longest_repetition=longest_repetition)

    def max_tokens(self, source_tokens: int) -> int:
        """The length at which an answer to a source text ends, in tokens."""
        source = max(1, source_tokens)
        spread = max(self.length_spread, _LEAST_DEVIATIONS * math.sqrt(self.length_ratio))
        return math.ceil(self.length_ratio * source + _ROOM * spread * math.sqrt(source))

    @property
    def repetition_limit(self) -> int:
        """Repeated tokens at which an answer ends; no target has as many."""
        return max(_LEAST_REPETITION, _REPETITION_ROOM * self.longest_repetition)

"""Settings of scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BleuTokenizer = Literal["13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", "none"]
"""Tokenizers of sacrebleu that need no download."""


@dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """Settings of scores.

    Attributes:
        bleu_tokenize: Tokenizer of BLEU, by sacrebleu's name. Default: by the script of the references.
    """

    bleu_tokenize: BleuTokenizer | None = None


DEFAULT_SCORING = ScoringSettings()

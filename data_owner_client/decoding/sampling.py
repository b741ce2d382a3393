"""Sampling from the mixture, so that drafts never change what is drawn.

A token is drawn as argmax(log p + g), where g is Gumbel noise (the Gumbel-max trick). The noise depends on the seed,
the prompt, the sample's number and the position alone. So the draw at a position is the same whether the position was
drafted or asked for by itself.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens.

    Attributes:
        temperature: log-probabilities are divided by it; 0 takes the most probable token.
        top_k: only so many most probable tokens may be drawn; 0 for all.
        top_p: only the fewest most probable tokens that together have this probability may be drawn.
        repetition_penalty: tokens that occurred have their log-probabilities multiplied by it.
        seed: of all noise.
        known_only: only tokens whose probability is known without the whole LM head may be drawn: the adapter's
            candidates, and the PLM's most probable token.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    known_only: bool = False

    def scores(self, logprob_V: Tensor, context: Sequence[int], *, ids_V: Tensor | None = None) -> Tensor:
        """Log-probabilities [V] after penalty, temperature, top-k and top-p, in that order; −∞ is never drawn.

        Args:
            logprob_V: of the mixture, float64.
            context: token ids of the prompt and all that follows it.
            ids_V: of the tokens, where these are not all of the vocabulary.
        """
        scores_V = logprob_V.clone()
        if self.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(context)))
            if ids_V is not None:
                seen = torch.isin(ids_V, seen)
            scores_V[seen] = scores_V[seen] * self.repetition_penalty
        if self.temperature == 0.0:
            return scores_V
        scores_V = scores_V / self.temperature
        if 0 < self.top_k < len(scores_V):
            scores_V[scores_V < scores_V.topk(self.top_k).values[-1]] = -math.inf
        if self.top_p < 1.0:
            falling_V, order_V = scores_V.sort(descending=True)
            before_V = falling_V.softmax(dim=-1).cumsum(dim=-1) - falling_V.softmax(dim=-1)
            scores_V[order_V[before_V >= self.top_p]] = -math.inf
        return scores_V

    def draw(
        self, logprob_V: Tensor, context: Sequence[int], noise: Noise, position: int, *, ids_V: Tensor | None = None
    ) -> int:
        """The place of a token among the V.

        Args:
            logprob_V: of the mixture, float64.
            context: token ids of the prompt and all that follows it.
            noise: of this sequence.
            position: of the token among the generated ones.
            ids_V: see `scores`.
        """
        scores_V = self.scores(logprob_V, context, ids_V=ids_V)
        if self.temperature > 0.0:
            scores_V = scores_V + noise.gumbel(position, len(scores_V))
        return int(scores_V.argmax())


class Noise:
    """The noise of one sequence.

    Args:
        seed: of all sequences.
        prompt: token ids.
        sample: number of this continuation among those of the same prompt.
    """

    def __init__(self, seed: int, prompt: Sequence[int], sample: int) -> None:
        self._key = struct.pack(f"<qq{len(prompt)}i", seed, sample, *prompt)

    def gumbel(self, position: int, size: int) -> Tensor:
        """Gumbel noise [size], float64, always the same for a position."""
        digest = hashlib.blake2b(self._key + struct.pack("<q", position), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
        return -torch.empty(size, dtype=torch.float64).exponential_(generator=generator).log()

"""Sampling from the mixture, so that drafts never change what is drawn.

A token is drawn as argmax(log p + g), where g is Gumbel noise (the Gumbel-max trick). The noise depends only on the
seed, the prompt, the sample's number and the position. So the draw at a position is the same with and without drafts.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from data_owner_client.decoding.settings import SamplingSettings


def sampling_scores(
    settings: SamplingSettings, logprob_V: Tensor, context: Sequence[int], *, ids_V: Tensor | None = None
) -> Tensor:
    """Log-probabilities [V] after penalty, temperature, top-k and top-p, in that order; −∞ is never drawn.

    Args:
        settings: settings of sampling.
        logprob_V: log-probabilities of the mixture, float64.
        context: token ids of the prompt and all that follows it.
        ids_V: token ids; None where `logprob_V` covers the whole vocabulary.
    """
    scores_V = logprob_V.clone()
    if settings.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(context)))
        if ids_V is not None:
            seen = torch.isin(ids_V, seen)
        scores_V[seen] = scores_V[seen] * settings.repetition_penalty
    if settings.temperature == 0.0:
        return scores_V
    scores_V = scores_V / settings.temperature
    if 0 < settings.top_k < len(scores_V):
        scores_V[scores_V < scores_V.topk(settings.top_k).values[-1]] = -math.inf
    if settings.top_p < 1.0:
        falling_V, order_V = scores_V.sort(descending=True)
        before_V = falling_V.softmax(dim=-1).cumsum(dim=-1) - falling_V.softmax(dim=-1)
        scores_V[order_V[before_V >= settings.top_p]] = -math.inf
    return scores_V


def draw_token(
    settings: SamplingSettings,
    logprob_V: Tensor,
    context: Sequence[int],
    noise: Noise,
    position: int,
    *,
    ids_V: Tensor | None = None,
) -> int:
    """The index of the drawn token in `logprob_V`.

    Args:
        settings: settings of sampling.
        logprob_V: log-probabilities of the mixture, float64.
        context: token ids of the prompt and all that follows it.
        noise: noise of this sequence.
        position: position of the token among the generated ones, from 0.
        ids_V: token ids; None where `logprob_V` covers the whole vocabulary.
    """
    scores_V = sampling_scores(settings, logprob_V, context, ids_V=ids_V)
    if settings.temperature > 0.0:
        scores_V = scores_V + noise.gumbel(position, len(scores_V))
    return int(scores_V.argmax())


class Noise:
    """The noise of one sequence.

    Args:
        seed: seed of all sequences.
        prompt: token ids of the prompt.
        sample: number of this continuation among those of the same prompt.
    """

    def __init__(self, seed: int, prompt: Sequence[int], sample: int) -> None:
        self._key = struct.pack(f"<qq{len(prompt)}i", seed, sample, *prompt)

    def gumbel(self, position: int, size: int) -> Tensor:
        """Gumbel noise [size], float64, always the same for a position."""
        digest = hashlib.blake2b(self._key + struct.pack("<q", position), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
        return -torch.empty(size, dtype=torch.float64).exponential_(generator=generator).log()

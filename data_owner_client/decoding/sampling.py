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
from protocol.errors import NumericalFault


def sampling_scores(
    settings: SamplingSettings, logprob_V: Tensor, context: Sequence[int], *, ids_V: Tensor | None = None
) -> Tensor:
    """Log-probabilities [V], up to a constant, after penalty, temperature, top-k and top-p, in that order.

    −∞ is never drawn. The most probable token always stays.

    Args:
        settings: settings of sampling.
        logprob_V: log-probabilities of the mixture, float64.
        context: token ids of the prompt and all that follows it.
        ids_V: token ids; None where `logprob_V` covers the whole vocabulary.

    Raises:
        NumericalFault: tokens shall be drawn, and none has a probability.
    """
    scores_V = logprob_V.clone()
    if settings.repetition_penalty != 1.0:
        token_ids_V = torch.arange(len(scores_V)) if ids_V is None else ids_V
        seen_V = torch.isin(token_ids_V, torch.tensor(sorted(set(context)), dtype=torch.int64))
        # A log-probability may be above zero by rounding; the penalty must lower it, too.
        penalised_V = torch.where(
            scores_V < 0, scores_V * settings.repetition_penalty, scores_V / settings.repetition_penalty
        )
        scores_V = torch.where(seen_V, penalised_V, scores_V)
    if settings.temperature == 0.0:
        return scores_V
    highest = scores_V.max()
    if not highest.isfinite():
        raise NumericalFault("No token has a probability.", hint="The server or the adapter is damaged.")
    # The most probable token is at zero, so that no temperature takes all of them to −∞.
    scores_V = (scores_V - highest) / settings.temperature
    if 0 < settings.top_k < len(scores_V):
        scores_V[scores_V < scores_V.topk(settings.top_k).values[-1]] = -math.inf
    if settings.top_p < 1.0:
        falling_V, order_V = scores_V.sort(descending=True, stable=True)
        probability_V = falling_V.softmax(dim=-1)
        dropped_V = probability_V.cumsum(dim=-1) - probability_V >= settings.top_p
        dropped_V[0] = False
        scores_V[order_V[dropped_V]] = -math.inf
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

"""The LM head as a function, not only a matrix.

What a model does after its last hidden state differs: OPT has a plain matrix, Cohere multiplies the logits, Granite
divides them, Gemma 2 squashes them with a soft-cap. Both sides apply the same `LMHead`, so that the data owner's
P_PEMA lives on exactly the scale of the owner's P_PLM.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Of a soft-cap: nearer to it, logits in float32 do not tell what they came from.
_MOST_SHARE = 1 - 1e-6


@dataclass(frozen=True)
class LMHead:
    """logits = cap · tanh(scale · (h Wᵀ + b) / cap), for all or for chosen rows of the vocabulary.

    Attributes:
        weight_V_D: one row per token, any float dtype.
        bias_V: optional, same dtype.
        logit_scale: factor on the logits; 1 for most models.
        softcap: bound of the logits (Gemma 2's `final_logit_softcapping`); None for no bound.
    """

    weight_V_D: Tensor
    bias_V: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, h_N_D: Tensor) -> Tensor:
        """Logits [N, V] in the dtype of the weight."""
        return self.of_products(self.products(h_N_D))

    def products(self, h_N_D: Tensor) -> Tensor:
        """h Wᵀ + b [N, V] in the dtype of the weight."""
        return F.linear(h_N_D.to(self.weight_V_D.dtype), self.weight_V_D, self.bias_V)

    def of_products(self, logits_N_V: Tensor) -> Tensor:
        """The logits that products h Wᵀ + b are; for whoever has a faster product, too."""
        if self.logit_scale != 1.0:
            logits_N_V = logits_N_V * self.logit_scale
        if self.softcap is not None:
            logits_N_V = torch.tanh(logits_N_V / self.softcap) * self.softcap
        return logits_N_V

    def products_of(self, logits_N_V: Tensor) -> Tensor:
        """The products h Wᵀ + b that gave logits; those at the bound itself count as next to it."""
        if self.softcap is not None:
            share_N_V = (logits_N_V / self.softcap).clamp(-_MOST_SHARE, _MOST_SHARE)
            logits_N_V = torch.atanh(share_N_V) * self.softcap
        return logits_N_V / self.logit_scale

    def parts(self) -> list[Tensor]:
        """The weight, and the bias if there is one."""
        return [self.weight_V_D, *([] if self.bias_V is None else [self.bias_V])]

    def rows_at_once(self) -> int:
        """How many rows have logits, and inputs, of 64 MiB of float32 together."""
        return max(1, 2**24 // max(self.weight_V_D.shape))

    def trailer(self) -> bytes:
        """What belongs to the head besides weight and bias, for digests: scale and soft-cap."""
        return json.dumps([self.logit_scale, self.softcap]).encode()

    def rows(self, index_C: Tensor | slice) -> LMHead:
        """The head of a part of the vocabulary."""
        bias_C = None if self.bias_V is None else self.bias_V[index_C]
        return LMHead(self.weight_V_D[index_C], bias_C, self.logit_scale, self.softcap)

    def to(self, target: torch.dtype | torch.device) -> LMHead:
        """The head in another dtype or on another device."""
        bias_V = None if self.bias_V is None else self.bias_V.to(target)
        return LMHead(self.weight_V_D.to(target), bias_V, self.logit_scale, self.softcap)

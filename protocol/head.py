"""LM head as a function from hidden states to logits.

Models differ in what follows their last hidden state: OPT has a plain matrix, Cohere multiplies the logits, Granite
divides them, Gemma 2 squashes them with a soft-cap. Both sides apply the same `LMHead`, so that the data owner's
P_PEMA lives on exactly the scale of the owner's P_PLM.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Largest |logit| / softcap that is inverted: nearer to 1, float32 no longer tells the products apart.
_MAX_SHARE = 1 - 1e-6


@dataclass(frozen=True)
class LMHead:
    """logits = cap · tanh(scale · (h Wᵀ + b) / cap), for all or for chosen rows of the vocabulary.

    Attributes:
        weight_V_D: weight W [V, D], one row a token, any float dtype.
        bias_V: bias b [V] in the weight's dtype; None for no bias.
        logit_scale: factor on the logits; 1 for most models.
        softcap: bound of the logits (Gemma 2's `final_logit_softcapping`); None for no bound.
    """

    weight_V_D: Tensor
    bias_V: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, h_N_D: Tensor) -> Tensor:
        """Logits [N, V] in the dtype of the weight."""
        return self.logits_from_products(self.products(h_N_D))

    def products(self, h_N_D: Tensor) -> Tensor:
        """h Wᵀ + b [N, V] in the dtype of the weight."""
        return F.linear(h_N_D.to(self.weight_V_D.dtype), self.weight_V_D, self.bias_V)

    def logits_from_products(self, logits_N_V: Tensor) -> Tensor:
        """Logits [N, V] from products h Wᵀ + b, which may come from a faster product than `products`."""
        if self.logit_scale != 1.0:
            logits_N_V = logits_N_V * self.logit_scale
        if self.softcap is not None:
            logits_N_V = torch.tanh(logits_N_V / self.softcap) * self.softcap
        return logits_N_V

    def products_from_logits(self, logits_N_V: Tensor) -> Tensor:
        """Products h Wᵀ + b [N, V] behind logits. Logits at the soft-cap are clamped to just below it."""
        if self.softcap is not None:
            share_N_V = (logits_N_V / self.softcap).clamp(-_MAX_SHARE, _MAX_SHARE)
            logits_N_V = torch.atanh(share_N_V) * self.softcap
        return logits_N_V / self.logit_scale

    def parts(self) -> list[Tensor]:
        """The weight, and the bias if there is one."""
        return [self.weight_V_D, *([] if self.bias_V is None else [self.bias_V])]

    def rows_per_chunk(self) -> int:
        """Number of rows whose logits (or inputs, if wider) take 64 MiB in float32."""
        return max(1, 2**24 // max(self.weight_V_D.shape))

    def trailer(self) -> bytes:
        """Scale and soft-cap as bytes, for digests of the head."""
        return json.dumps([self.logit_scale, self.softcap]).encode()

    def rows(self, index_C: Tensor | slice) -> LMHead:
        """The head of a part of the vocabulary."""
        bias_C = None if self.bias_V is None else self.bias_V[index_C]
        return LMHead(self.weight_V_D[index_C], bias_C, self.logit_scale, self.softcap)

    def to(self, target: torch.dtype | torch.device) -> LMHead:
        """The head in another dtype or on another device."""
        bias_V = None if self.bias_V is None else self.bias_V.to(target)
        return LMHead(self.weight_V_D.to(target), bias_V, self.logit_scale, self.softcap)

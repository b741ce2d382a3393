"""Attention masks that are made without reading their values, for which the host would wait in every step.

transformers' `sdpa` leaves a mask out if it masks nothing, which only the device can tell. The runner gives a mask only
where there is padding, so that there is nothing to find out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "pema_sdpa"


def mask_without_waiting(model: PreTrainedModel) -> None:
    """Let a model make its masks without reading what is on the device. Its results do not change.

    Other attention implementations than `sdpa` make their masks so already.
    """
    if model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation(_NAME)
    # GPT-2 and others search every input without a mask for padding tokens.
    model.base_model.warn_if_padding_and_no_attention_mask = _ignore


def padding_mask(lengths: Sequence[int]) -> Tensor:
    """Mask of sequences that end at the last slot, int64 [B, S] on the host: 1 for tokens, 0 for padding."""
    slots = max(lengths)
    return (torch.arange(slots) >= slots - torch.tensor(lengths)[:, None]).long()


def _ignore(*args: object) -> None:
    """Do nothing."""


def _mask(
    *args: Any, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **options: Any
) -> Tensor | None:
    """The mask of `sdpa`, which is left out only where there is no padding mask."""
    may_skip = allow_is_causal_skip and attention_mask is None
    mask: Tensor | None = sdpa_mask(*args, attention_mask=attention_mask, allow_is_causal_skip=may_skip, **options)
    return mask


AttentionInterface.register(_NAME, sdpa_attention_forward)
AttentionMaskInterface.register(_NAME, _mask)

"""Distillation of an emulator's middle layers on text of the owner's own."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.layer_drop import layers_of

_CHUNK_TOKENS = 128
_BATCH = 8
RATE = 3e-4


def public_text() -> str:
    """Text that any owner of a model has: the language reference in Python's standard library, 0.7 MB."""
    return "\n\n".join(pydoc_data.topics.topics.values())


def chunks(ids: Sequence[int], tokens: int) -> Tensor:
    """The first `tokens` ids, or fewer, in rows of equal length [B, T]."""
    whole = min(tokens, len(ids)) // _CHUNK_TOKENS * _CHUNK_TOKENS
    return torch.tensor(ids[:whole]).view(-1, _CHUNK_TOKENS)


def distil(full: PreTrainedModel, emulator: PreTrainedModel, ids_B_T: Tensor, *, adapter: int) -> list[float]:
    """Train the layers between the emulator's ends until the states behind them resemble the full model's.

    The loss is the mean squared difference over the mean square of the full model's states.

    Args:
        full: the model.
        emulator: the model with fewer layers between its ends, changed in place.
        ids_B_T: token ids of texts.
        adapter: number of layers at each end.

    Returns:
        The loss of each step.
    """
    layers = layers_of(emulator)
    emulator.requires_grad_(False)
    weights = [weight.requires_grad_() for layer in layers[adapter:-adapter] for weight in layer.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=RATE, fused=True)
    batches = torch.randperm(len(ids_B_T), generator=torch.Generator().manual_seed(0)).split(_BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / len(batches))
    losses = []
    for batch in batches:
        with torch.no_grad():
            wanted_B_T_D = _states(full, ids_B_T[batch], adapter)
        states_B_T_D = _states(emulator, ids_B_T[batch], adapter)
        loss = (states_B_T_D - wanted_B_T_D).square().mean() / wanted_B_T_D.square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def _states(model: PreTrainedModel, ids_B_T: Tensor, adapter: int) -> Tensor:
    """States [B, T, D] at the input of the first of the last `adapter` layers, float32."""
    model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
        output: Any = model.base_model(input_ids=ids_B_T, use_cache=False, output_hidden_states=True)
    states: Tensor = output.hidden_states[len(layers_of(model)) - adapter].float()
    return states

"""Models made smaller by leaving layers out."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a causal language model, from its input to its output."""
    count = model.config.get_text_config().num_hidden_layers
    (layers,) = [
        module for module in model.base_model.modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    return layers


def uniform_choice(layers: int, wanted: int) -> list[int]:
    """Numbers of `wanted` of the layers at equal distances, the first and the last included, as offsite-tuning draws.

    Source: Xiao, Lin & Han 2023, arXiv 2302.04870, section 3.3.
    """
    if wanted == 1:
        return [layers // 2]
    return [round(number * (layers - 1) / (wanted - 1)) for number in range(wanted)]


def without_other_layers(model: PreTrainedModel, numbers: Collection[int]) -> PreTrainedModel:
    """A copy of a model that has only the layers of these numbers, in their order."""
    smaller = copy.deepcopy(model)
    config: Any = smaller.config.get_text_config()
    layers = layers_of(smaller)
    for number in reversed(range(len(layers))):
        if number not in numbers:
            del layers[number]
    for place, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                vars(module)["layer_idx"] = place  # in the cache of keys and values
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [kind for number, kind in enumerate(config.layer_types) if number in numbers]
    return smaller

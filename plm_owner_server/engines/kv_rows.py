"""A transformers KV cache as plain rows, one a token: cut, kept and put together again by anyone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache


@dataclass(frozen=True)
class KvLayout:
    """How a row's F numbers divide into the layers' keys and values.

    Attributes:
        heads: for each layer, its keys' (heads, width) and its values' (heads, width).
    """

    heads: tuple[tuple[tuple[int, int], tuple[int, int]], ...]

    @classmethod
    def of(cls, cache: DynamicCache) -> KvLayout:
        """The layout of a cache that holds something."""
        return cls(tuple((_heads(layer.keys), _heads(layer.values)) for layer in cache.layers))

    def unpack(self, kv_B_T_F: Tensor, config: Any) -> DynamicCache:
        """A new cache with these states."""
        cache = DynamicCache(config=config)
        sizes = [heads * width for pair in self.heads for heads, width in pair]
        parts = iter(kv_B_T_F.split(sizes, dim=-1))
        for index, (keys, values) in enumerate(self.heads):
            cache.update(_layer(next(parts), keys), _layer(next(parts), values), index)
        return cache


def pack(cache: DynamicCache, rows_R: Tensor, start: int) -> Tensor:
    """States [R, S, F] of some of a cache's sequences, from slot `start` on."""
    states = [state for layer in cache.layers for state in (layer.keys, layer.values)]
    return torch.cat([state[rows_R, :, start:].transpose(1, 2).flatten(2) for state in states], dim=-1)


def pad(pieces: Sequence[Sequence[Tensor]]) -> Tensor:
    """Pieces [T_i, F] of each sequence, joined and padded on the right: [B, T, F]."""
    width = max(parts[0].shape[1] for parts in pieces if parts)
    some = next(parts[0] for parts in pieces if parts)
    lengths = [sum(map(len, parts)) for parts in pieces]
    padded_B_T_F = some.new_empty(len(pieces), max(lengths), width)
    for row_T_F, parts, length in zip(padded_B_T_F, pieces, lengths, strict=True):
        if parts:
            torch.cat(list(parts), out=row_T_F[:length])
        row_T_F[length:] = 0  # masked, but not even a masked NaN is harmless
    return padded_B_T_F


def _heads(state_B_H_T_W: Tensor) -> tuple[int, int]:
    return state_B_H_T_W.shape[1], state_B_H_T_W.shape[3]


def _layer(part_B_T_F: Tensor, heads: tuple[int, int]) -> Tensor:
    layer_B_H_T_W: Tensor = part_B_T_F.unflatten(-1, heads).transpose(1, 2)
    return layer_B_H_T_W

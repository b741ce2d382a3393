"""Attention states of sequences that advance together; sequences join and leave at any step.

All sequences end at the last slot, with padding before the shorter ones. The next token of every sequence therefore
goes into one common slot. No padding lies between two tokens, so that the distance of two slots is the distance of
their positions, as sliding windows need.

Shapes: B sequences, H heads, S slots, W width of a head, F numbers a token in all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

# Free slots at the end of a new buffer: the number of steps until the next copy.
_SPARE_SLOTS = 32


class _Layer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """Keys and values [B, H, S, W] of one layer, as views of buffers with spare slots.

    All slots are stored even if the layer attends to a window only, because another sequence may need them.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append slots. Return all keys and all values."""
        new_states = key_states, value_states
        if not self.is_initialized:
            self.hold(new_states)
            return self.keys, self.values
        steps, slots = key_states.shape[2], self.keys.shape[2]
        if self._end + steps > self._buffers[0].shape[2]:
            self.hold([_stacked([old], slots, spare=steps + _SPARE_SLOTS) for old in (self.keys, self.values)], slots)
        for buffer, new in zip(self._buffers, new_states, strict=True):
            buffer[: len(new), :, self._end : self._end + steps] = new
        self._show(rows=len(key_states), slots=slots + steps, end=self._end + steps)
        return self.keys, self.values

    def hold(self, buffers: Sequence[Tensor], slots: int | None = None) -> None:
        """Use these buffers [B, H, ≥ slots, W], whose first `slots` slots are filled; None means all of them."""
        if not self.is_initialized:
            self.lazy_initialization(buffers[0], buffers[1])
        self._buffers = tuple(buffers)
        slots = self._buffers[0].shape[2] if slots is None else slots
        self._show(rows=len(self._buffers[0]), slots=slots, end=slots)

    def remove(self, row: int) -> None:
        """Remove a sequence by moving the last one to its row."""
        last = len(self.keys) - 1
        if row != last:
            self.keys[row], self.values[row] = self.keys[last], self.values[last]
        self._show(rows=last, slots=self.keys.shape[2], end=self._end)

    def trim(self, slots: int) -> None:
        """Drop all but the last `slots` slots."""
        self._show(rows=len(self.keys), slots=slots, end=self._end)

    def _show(self, *, rows: int, slots: int, end: int) -> None:
        self._end = end
        self.keys, self.values = (buffer[:rows, :, end - slots : end] for buffer in self._buffers)


class _PassingLayer(DynamicLayer):  # type: ignore[misc]
    """A layer that keeps nothing."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the states."""
        return key_states, value_states


class PassingCache(Cache):  # type: ignore[misc]
    """A transformers cache that is always empty, for passes whose states nobody needs.

    Without any cache, transformers looks for packed texts in the positions, and the host waits for what it finds.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_PassingLayer)


class AlignedCache(Cache):  # type: ignore[misc]
    """A transformers cache of sequences that all end at the last slot."""

    layers: list[_Layer]

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_Layer)

    @property
    def filled_layers(self) -> list[_Layer]:
        """Layers that store states; in some models layers share those of another layer."""
        return [layer for layer in self.layers if layer.is_initialized]

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return len(self.filled_layers[0].keys) if self.filled_layers else 0

    def select(self, rows_N: Tensor) -> None:
        """Keep these sequences and drop the others."""
        for layer in self.filled_layers:
            index_N = rows_N.to(layer.keys.device)  # layers may be spread over devices
            layer.hold([layer.keys[index_N], layer.values[index_N]])

    def join(self, other: AlignedCache) -> None:
        """Add the sequences of another cache, which must not be used afterwards."""
        if not self.rows:
            self.layers = other.layers
            return
        for ours, theirs in zip(self.filled_layers, other.filled_layers, strict=True):
            slots = max(ours.keys.shape[2], theirs.keys.shape[2])
            pairs = ((ours.keys, theirs.keys), (ours.values, theirs.values))
            ours.hold([_stacked(pair, slots, spare=_SPARE_SLOTS) for pair in pairs], slots)

    def remove(self, row: int) -> None:
        """Remove a sequence by moving the last one to its row; the other rows stay."""
        for layer in self.filled_layers:
            layer.remove(row)

    def trim(self, slots: int) -> None:
        """Drop all but the last `slots` slots; the others must be padding in all sequences."""
        for layer in self.filled_layers:
            layer.trim(slots)

    def states(self, row: int, start: int, stop: int) -> Tensor:
        """States [stop − start, F] of a sequence. Slots count from the end: −1 is the last, and `stop` 0 is the end."""
        slots = slice(start, stop or None)
        layers = self.filled_layers
        parts = [
            part[row, :, slots].transpose(0, 1).flatten(1) for layer in layers for part in (layer.keys, layer.values)
        ]
        return torch.cat([part.to(parts[0].device) for part in parts], dim=-1)


@dataclass(frozen=True)
class KvLayout:
    """Division of a token's F numbers into the layers' keys and values.

    Attributes:
        heads: (heads, width) of the keys and (heads, width) of the values of each layer; None if it stores no states.
        devices: device of each layer; None if it stores no states.
    """

    heads: tuple[tuple[tuple[int, int], tuple[int, int]] | None, ...]
    devices: tuple[torch.device | None, ...]

    @classmethod
    def from_cache(cls, cache: Cache) -> KvLayout:
        """The layout of a cache that is not empty."""
        return cls(
            tuple(
                (_heads(layer.keys), _heads(layer.values)) if layer.is_initialized else None for layer in cache.layers
            ),
            tuple(layer.keys.device if layer.is_initialized else None for layer in cache.layers),
        )

    def unpack(self, pieces: Sequence[Sequence[Tensor]], lengths: Sequence[int]) -> AlignedCache:
        """A cache with the first states of each sequence.

        Args:
            pieces: states of each sequence, in pieces [S_i, F].
            lengths: number of states to use of each sequence, at most as many as its pieces have.
        """
        example_S_F = next(parts[0] for parts in pieces if parts)
        slots = max(lengths)
        # With spare slots, so that the first steps need no copy.
        buffer_B_S_F = example_S_F.new_empty(len(pieces), slots + _SPARE_SLOTS, example_S_F.shape[1])
        for row_S_F, parts, length in zip(buffer_B_S_F, pieces, lengths, strict=True):
            row_S_F[: slots - length].zero_()  # even a masked NaN would do harm
            for at, part_S_F in _cut(parts, length):
                start = slots - length + at
                row_S_F[start : start + len(part_S_F)] = part_S_F
        cache = AlignedCache()
        sizes = [heads * width for pair in self.heads if pair for heads, width in pair]
        parts_B_S_F = iter(buffer_B_S_F.split(sizes, dim=-1))
        for pair, device in zip(self.heads, self.devices, strict=True):
            layer = _Layer()
            if pair is not None:
                states = [next(parts_B_S_F).unflatten(-1, heads).transpose(1, 2).to(device) for heads in pair]
                layer.hold(states, slots)
            cache.layers.append(layer)
        return cache


def _cut(parts: Sequence[Tensor], length: int) -> Iterator[tuple[int, Tensor]]:
    """The first `length` states as (index of the first state, piece)."""
    at = 0
    for part_S_F in parts:
        if at < length:
            yield at, part_S_F[: length - at]
        at += len(part_S_F)


def _stacked(parts: Sequence[Tensor], slots: int, *, spare: int) -> Tensor:
    """States of several sequences [B, H, slots + spare, W]: padded on the left, with spare slots on the right."""
    _, heads, _, width = parts[0].shape
    buffer = parts[0].new_empty(sum(map(len, parts)), heads, slots + spare, width)
    for rows, part in zip(buffer.split([len(part) for part in parts]), parts, strict=True):
        padding = slots - part.shape[2]
        rows[:, :, :padding].zero_()
        rows[:, :, padding:slots] = part
    return buffer


def _heads(state_B_H_S_W: Tensor) -> tuple[int, int]:
    return state_B_H_S_W.shape[1], state_B_H_S_W.shape[3]

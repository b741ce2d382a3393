"""Attention states of sequences that advance together, of which any may come and go at any step.

All of them end at the last slot; before a shorter one there is padding. So all go on at the same slot, no padding lies
between two tokens, and slots are as far apart as positions, which is what sliding windows need.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

# Free slots at the end of a new buffer: so many steps go by without a copy.
_ROOM = 32


class _Layer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """One layer's keys and values [B, H, S, W]: views of buffers with room for more slots.

    It keeps all of them, also where the layer attends to a window only: another sequence may need them.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append slots; all keys and all values."""
        news = key_states, value_states
        if not self.is_initialized:
            self.hold(news)
            return self.keys, self.values
        steps, slots = key_states.shape[2], self.keys.shape[2]
        if self._end + steps > self._buffers[0].shape[2]:
            self.hold([_stacked([old], slots, room=steps + _ROOM) for old in (self.keys, self.values)], slots)
        for buffer, new in zip(self._buffers, news, strict=True):
            buffer[: len(new), :, self._end : self._end + steps] = new
        self._show(rows=len(key_states), slots=slots + steps, end=self._end + steps)
        return self.keys, self.values

    def hold(self, buffers: Sequence[Tensor], slots: int | None = None) -> None:
        """Take these buffers [B, H, ≥ slots, W], of which the first slots are taken."""
        if not self.is_initialized:
            self.lazy_initialization(buffers[0], buffers[1])
        self._buffers = tuple(buffers)
        slots = self._buffers[0].shape[2] if slots is None else slots
        self._show(rows=len(self._buffers[0]), slots=slots, end=slots)

    def remove(self, row: int) -> None:
        """Let the last sequence take the place of one that leaves."""
        last = len(self.keys) - 1
        if row != last:
            self.keys[row], self.values[row] = self.keys[last], self.values[last]
        self._show(rows=last, slots=self.keys.shape[2], end=self._end)

    def trim(self, slots: int) -> None:
        """Let go of all but the last slots."""
        self._show(rows=len(self.keys), slots=slots, end=self._end)

    def _show(self, *, rows: int, slots: int, end: int) -> None:
        self._end = end
        self.keys, self.values = (buffer[:rows, :, end - slots : end] for buffer in self._buffers)


class AlignedCache(Cache):  # type: ignore[misc]
    """A transformers cache of sequences that all end at the last slot."""

    layers: list[_Layer]

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_Layer)

    @property
    def held(self) -> list[_Layer]:
        """Layers with states of their own: some models share them between layers."""
        return [layer for layer in self.layers if layer.is_initialized]

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return len(self.held[0].keys) if self.held else 0

    def select(self, rows_R: Tensor) -> None:
        """Go on with some of the sequences."""
        for layer in self.held:
            own_R = rows_R.to(layer.keys.device)  # layers may be spread over devices
            layer.hold([layer.keys[own_R], layer.values[own_R]])

    def join(self, other: AlignedCache) -> None:
        """Take in the sequences of another cache, which is spent."""
        if not self.rows:
            self.layers = other.layers
            return
        for ours, theirs in zip(self.held, other.held, strict=True):
            slots = max(ours.keys.shape[2], theirs.keys.shape[2])
            pairs = ((ours.keys, theirs.keys), (ours.values, theirs.values))
            ours.hold([_stacked(pair, slots, room=_ROOM) for pair in pairs], slots)

    def remove(self, row: int) -> None:
        """Let the last sequence take the place of one that leaves; the others stay where they are."""
        for layer in self.held:
            layer.remove(row)

    def trim(self, slots: int) -> None:
        """Let go of slots that are padding in all sequences."""
        for layer in self.held:
            layer.trim(slots)

    def states(self, row: int, start: int, stop: int) -> Tensor:
        """States [stop − start, F] of a sequence at some slots, counted from the end (−1 is the last)."""
        slots = slice(start, stop or None)
        parts = [part[row, :, slots].transpose(0, 1).flatten(1) for layer in self.held for part in _both(layer)]
        return torch.cat([part.to(parts[0].device) for part in parts], dim=-1)


@dataclass(frozen=True)
class KvLayout:
    """How a token's F numbers divide into the layers' keys and values.

    Attributes:
        heads: for each layer, its keys' (heads, width) and its values' (heads, width); None if it has none of its own.
        devices: where each layer is; None if it has none of its own.
    """

    heads: tuple[tuple[tuple[int, int], tuple[int, int]] | None, ...]
    devices: tuple[torch.device | None, ...]

    @classmethod
    def of(cls, cache: Cache) -> KvLayout:
        """The layout of a cache that holds something."""
        return cls(
            tuple(
                (_heads(layer.keys), _heads(layer.values)) if layer.is_initialized else None for layer in cache.layers
            ),
            tuple(layer.keys.device if layer.is_initialized else None for layer in cache.layers),
        )

    def unpack(self, pieces: Sequence[Sequence[Tensor]], lengths: Sequence[int]) -> AlignedCache:
        """A cache with the first states of each sequence.

        Args:
            pieces: states [S_i, F] of each sequence.
            lengths: number of states wanted of each, not more than there are.
        """
        some = next(parts[0] for parts in pieces if parts)
        slots = max(lengths)
        # With room, so that the first steps need no copy.
        buffer_B_S_F = some.new_empty(len(pieces), slots + _ROOM, some.shape[1])
        for row_S_F, parts, length in zip(buffer_B_S_F, pieces, lengths, strict=True):
            row_S_F[: slots - length] = 0  # not even a masked NaN is harmless
            for at, part_S_F in _cut(parts, length):
                start = slots - length + at
                row_S_F[start : start + len(part_S_F)] = part_S_F
        cache = AlignedCache()
        sizes = [heads * width for pair in self.heads if pair for heads, width in pair]
        parts_B_S_F = iter(buffer_B_S_F.split(sizes, dim=-1))
        for pair, device in zip(self.heads, self.devices, strict=True):
            layer = _Layer()
            if pair is not None:
                own = [next(parts_B_S_F).unflatten(-1, heads).transpose(1, 2).to(device) for heads in pair]
                layer.hold(own, slots)
            cache.layers.append(layer)
        return cache


def _cut(parts: Sequence[Tensor], length: int) -> Iterator[tuple[int, Tensor]]:
    """The first `length` states, each piece with its place."""
    at = 0
    for part_S_F in parts:
        if at < length:
            yield at, part_S_F[: length - at]
        at += len(part_S_F)


def _stacked(parts: Sequence[Tensor], slots: int, *, room: int) -> Tensor:
    """States of several sequences [B, H, slots + room, W]: padded on the left, with room on the right."""
    _, heads, _, width = parts[0].shape
    buffer = parts[0].new_empty(sum(map(len, parts)), heads, slots + room, width)
    for rows, part in zip(buffer.split([len(part) for part in parts]), parts, strict=True):
        padding = slots - part.shape[2]
        rows[:, :, :padding] = 0
        rows[:, :, padding:slots] = part
    return buffer


def _both(layer: _Layer) -> tuple[Tensor, Tensor]:
    return layer.keys, layer.values


def _heads(state_B_H_S_W: Tensor) -> tuple[int, int]:
    return state_B_H_S_W.shape[1], state_B_H_S_W.shape[3]

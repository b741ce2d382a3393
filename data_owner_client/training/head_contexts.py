"""Contexts whose distributions are asked for: those of a memory, which the owner has seen when it was built."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data_owner_client.data.pairs import Pair
from data_owner_client.memory.encode import TokenizedPair, tokenize_pair
from data_owner_client.memory.manifest import MemoryPlan
from data_owner_client.plm.remote_plm import RemotePlm


@dataclass(frozen=True)
class Context:
    """The tokens of `prefix` and, after them, `drafted` ones of the PLM's own."""

    prefix: tuple[int, ...]
    drafted: int

    @property
    def key(self) -> str:
        """Its name, for files."""
        ids = np.asarray([self.drafted, *self.prefix], "<i4").tobytes()
        return hashlib.sha256(ids).hexdigest()


def sample_contexts(plm: RemotePlm, plan: MemoryPlan, pairs: Sequence[Pair]) -> Iterator[Context]:
    """Different contexts of a memory in an order that is random and always the same.

    So the first so many of them are spread over examples and positions, and asking for more goes on behind them. No
    example gives a second one before all have given a first.

    Args:
        plm: of which the tokenizer.
        plan: of the memory.
        pairs: that it was built from.
    """
    order = torch.Generator().manual_seed(0)

    def opened() -> Iterator[tuple[TokenizedPair, list[int]]]:
        for index in torch.randperm(len(pairs), generator=order).tolist():
            pair = tokenize_pair(plm, plan.task, pairs[index], label=f"pair {index + 1}")
            yield pair, torch.randperm(len(pair.target), generator=order).tolist()

    seen = set[Context]()
    examples: Iterator[tuple[TokenizedPair, list[int]]] = opened()
    while True:
        waiting = []
        for pair, positions in examples:
            context = _at(pair, positions.pop(), private=plan.context_mode == "private")
            if positions:
                waiting.append((pair, positions))
            if context not in seen:
                seen.add(context)
                yield context
        if not waiting:
            return
        examples = iter(waiting)


def _at(pair: TokenizedPair, position: int, *, private: bool) -> Context:
    if private:
        return Context(tuple(pair.prompt), position)
    return Context((*pair.prompt, *pair.target[:position]), 0)

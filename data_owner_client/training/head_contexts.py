"""Contexts whose distributions are requested: those of a memory, which the owner saw when the memory was built."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data_owner_client.data.pairs import Pair
from data_owner_client.memory.manifest import MemoryPlan
from data_owner_client.memory.tokenized_pairs import TokenizedPair, tokenize_pair
from data_owner_client.plm.remote_plm import RemotePlm


@dataclass(frozen=True)
class Context:
    """A context: the tokens of `prefix`, followed by `drafted` tokens of the PLM's greedy continuation."""

    prefix: tuple[int, ...]
    drafted: int

    @property
    def key(self) -> str:
        """Name of the context in the cache, a SHA-256."""
        ids = np.asarray([self.drafted, *self.prefix], "<i4").tobytes()
        return hashlib.sha256(ids).hexdigest()


def sample_contexts(
    plm: RemotePlm, plan: MemoryPlan, pairs: Sequence[Pair], shown: Sequence[Pair] | None = None
) -> Iterator[Context]:
    """Yield the different contexts of a memory in a random order that is always the same.

    The first n of them are spread over examples and positions, and a larger n adds contexts behind them. Every example
    gives one context before any gives its second.

    Args:
        plm: gives the tokenizer.
        plan: plan of the memory.
        pairs: pairs that the memory was built from.
        shown: these pairs with surrogates, of a redacted memory; None in other memories.
    """
    order = torch.Generator().manual_seed(0)

    def tokenized() -> Iterator[tuple[TokenizedPair, list[int]]]:
        for index in torch.randperm(len(pairs), generator=order).tolist():
            pair = tokenize_pair(plm, plan.task, pairs[index], shown[index] if shown else None)
            yield pair, torch.randperm(len(pair.teacher_forced), generator=order).tolist()

    seen = set[Context]()
    examples: Iterator[tuple[TokenizedPair, list[int]]] = tokenized()
    while True:
        unfinished = []
        for pair, positions in examples:
            context = _at(pair, positions.pop(), private=plan.context_mode == "private")
            if positions:
                unfinished.append((pair, positions))
            if context not in seen:
                seen.add(context)
                yield context
        if not unfinished:
            return
        examples = iter(unfinished)


def _at(pair: TokenizedPair, position: int, *, private: bool) -> Context:
    if private:
        return Context(tuple(pair.prompt), position)
    return Context((*pair.prompt, *pair.teacher_forced[:position]), 0)

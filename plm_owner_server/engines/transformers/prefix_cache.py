"""What the model computed for a beginning of a text, kept for the next text that begins alike.

A radix tree over token ids: texts share the part they share, as the prompts of a task do, and a text that goes on from
an earlier one finds all of it. Only an optimisation: a miss costs time, and nothing else. Each tenant has branches of
its own from the root on, so that none learns from the time an answer takes what another has asked. What was not used
for a while is dropped: nothing of a text stays for long.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Of a node among its parent's children: its first token; among those of the root also the tenant.
_Key = int | tuple[str, int]


@dataclass(eq=False)
class _Node:
    """A run of tokens and their states; the way from the root spells out a whole prefix."""

    key: _Key
    ids: list[int]
    kv_T_F: Tensor
    parent: _Node | None
    children: dict[_Key, _Node] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        return self.kv_T_F.nbytes


class PrefixCache:
    """Attention states (one row of F numbers a token) of token sequences; the least recently used go first.

    Thread-safe, so that one thread may drop what another has long not used.

    Args:
        max_bytes: bound on all rows together, in bytes.
        max_idle_s: seconds after which what was not used is dropped.
        clock: seconds that go by.
    """

    def __init__(
        self, max_bytes: int, max_idle_s: float = math.inf, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_bytes = max_bytes
        self._max_idle_s = max_idle_s
        self._clock = clock
        self._lock = threading.Lock()
        self._root = _Node(0, [], torch.empty(0, 0), None)
        # With the time of their last use, least recently used first. Whoever touches a node touches the way to it last,
        # so the first one is a leaf.
        self._nodes: OrderedDict[_Node, float] = OrderedDict()
        self.size_bytes = 0

    def drop_unused(self) -> None:
        """Drop what was not used for so long. To be called now and then, also when nobody asks for anything."""
        with self._lock:
            self._drop_unused()

    def match(self, tenant: str, ids: Sequence[int]) -> list[Tensor]:
        """States of the longest prefix of `ids` known of a tenant, in pieces [T_i, F]; empty if there is none."""
        with self._lock:
            self._drop_unused()
            return self._match(tenant, ids)

    def _match(self, tenant: str, ids: Sequence[int]) -> list[Tensor]:
        node, at, pieces = self._root, 0, list[Tensor]()
        while at < len(ids) and (child := node.children.get(_key(tenant, ids, at))) is not None:
            common = _common(child.ids, ids, at)
            pieces.append(child.kv_T_F[:common])
            node, at = child, at + common
            if common < len(child.ids):
                break
        self._touch(node)
        return pieces

    def insert(self, tenant: str, ids: Sequence[int], kv_S_F: Tensor) -> None:
        """Keep the states of the last S tokens of `ids`.

        Those before are kept already, or else nothing is: a tree has no use for states in mid-air.

        Args:
            tenant: who asked for it.
            ids: a whole sequence.
            kv_S_F: its last states; copied as far as they are new.
        """
        with self._lock:
            self._drop_unused()
            self._insert(tenant, ids, kv_S_F)

    def _insert(self, tenant: str, ids: Sequence[int], kv_S_F: Tensor) -> None:
        node, at = self._root, 0
        while at < len(ids) and (child := node.children.get(_key(tenant, ids, at))) is not None:
            common = _common(child.ids, ids, at)
            node, at = child if common == len(child.ids) else self._split(child, common), at + common
        new = len(ids) - at
        if 0 < new <= len(kv_S_F):
            leaf = _Node(_key(tenant, ids, at), list(ids[at:]), kv_S_F[len(kv_S_F) - new :].clone(), node)
            node.children[leaf.key] = leaf
            self._nodes[leaf] = self._clock()
            self.size_bytes += leaf.size_bytes
            node = leaf
        self._touch(node)
        while self.size_bytes > self._max_bytes:
            self._evict()

    def _touch(self, node: _Node) -> None:
        now = self._clock()
        while node.parent is not None:
            self._nodes[node] = now
            self._nodes.move_to_end(node)
            node = node.parent

    def _split(self, node: _Node, at: int) -> _Node:
        """Divide a node in two, so that another text can branch off; the upper part."""
        assert node.parent is not None  # noqa: S101  (for the type checker: the root is never split)
        # Copies: a view would keep the memory of both parts until both are gone. Both before the tree is touched, as
        # there may be no memory for them.
        upper_T_F, lower_T_F = node.kv_T_F[:at].clone(), node.kv_T_F[at:].clone()
        upper = _Node(node.key, node.ids[:at], upper_T_F, node.parent)
        node.parent.children[upper.key] = upper
        node.key, node.ids, node.kv_T_F, node.parent = node.ids[at], node.ids[at:], lower_T_F, upper
        upper.children[node.key] = node
        self._nodes[upper] = self._nodes[node]
        return upper

    def _drop_unused(self) -> None:
        since = self._clock() - self._max_idle_s
        while self._nodes and next(iter(self._nodes.values())) < since:
            self._evict()

    def _evict(self) -> None:
        leaf, _ = self._nodes.popitem(last=False)
        assert leaf.parent is not None  # noqa: S101  (for the type checker: the root is not among the nodes)
        del leaf.parent.children[leaf.key]
        self.size_bytes -= leaf.size_bytes


def _key(tenant: str, ids: Sequence[int], at: int) -> _Key:
    return ids[at] if at else (tenant, ids[at])


def _common(known: Sequence[int], ids: Sequence[int], at: int) -> int:
    """How many tokens `ids` from position `at` shares with `known`."""
    for step, (ours, theirs) in enumerate(zip(known, ids[at : at + len(known)], strict=False)):
        if ours != theirs:
            return step
    return min(len(known), len(ids) - at)

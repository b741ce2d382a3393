"""Cache of attention states for texts that begin with the same tokens.

The cache is a radix tree over token ids. Texts share the states of their common prefix, and a text that continues an
earlier one finds all states of the earlier one. The cache is only an optimisation: a miss costs time and nothing else.
Tenants share no branches, so that response times reveal nothing about other tenants' texts. States that were not used
for a while are removed.
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

# Key of a node among its parent's children: its first token; below the root also the tenant.
_Key = int | tuple[str, int]


@dataclass(eq=False)
class _Node:
    """A run of tokens and their states; the path from the root spells a whole prefix."""

    key: _Key
    ids: list[int]
    kv_T_F: Tensor
    parent: _Node | None
    children: dict[_Key, _Node] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        return self.kv_T_F.nbytes


class PrefixCache:
    """Least-recently-used cache of attention states, one row of F numbers a token.

    Thread-safe: one thread may evict idle states while another uses the cache.

    Args:
        max_bytes: bound on the size of all states, in bytes.
        max_idle_seconds: time without use after which states are removed, in seconds.
        clock: current time, in seconds.

    Attributes:
        size_bytes: present size of all states, in bytes.
    """

    def __init__(
        self, max_bytes: int, max_idle_seconds: float = math.inf, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_bytes = max_bytes
        self._max_idle_seconds = max_idle_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._root = _Node(0, [], torch.empty(0, 0), None)
        # With the time of their last use, least recently used first. Touching a node touches its ancestors after it,
        # so the first node is a leaf.
        self._nodes: OrderedDict[_Node, float] = OrderedDict()
        self.size_bytes = 0

    def evict_idle(self) -> None:
        """Remove states that were not used for `max_idle_seconds`. Call it regularly, also without requests."""
        with self._lock:
            self._evict_idle()

    def clear(self) -> None:
        """Remove all states."""
        with self._lock:
            while self._nodes:
                self._evict()

    def match(self, tenant: str, ids: Sequence[int]) -> list[Tensor]:
        """States of the tenant's longest cached prefix of `ids`, in pieces [T_i, F]; empty if there is none."""
        with self._lock:
            self._evict_idle()
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
        """Store the states of the last S tokens of `ids`.

        Nothing is stored if the states of the tokens before them are not cached: the tree needs whole prefixes.

        Args:
            tenant: the tenant that the text belongs to.
            ids: token ids of a whole sequence.
            kv_S_F: its last states; those that are not cached yet are copied.
        """
        with self._lock:
            self._evict_idle()
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
        """Split a node in two, so that another text can branch off. Return the upper part."""
        assert node.parent is not None  # noqa: S101  (for the type checker: the root is never split)
        # Copies, because a view would hold the memory of both parts until both are gone. Both are made before the tree
        # is changed, because memory may run out.
        upper_T_F, lower_T_F = node.kv_T_F[:at].clone(), node.kv_T_F[at:].clone()
        upper = _Node(node.key, node.ids[:at], upper_T_F, node.parent)
        node.parent.children[upper.key] = upper
        node.key, node.ids, node.kv_T_F, node.parent = node.ids[at], node.ids[at:], lower_T_F, upper
        upper.children[node.key] = node
        self._nodes[upper] = self._nodes[node]
        return upper

    def _evict_idle(self) -> None:
        oldest_use = self._clock() - self._max_idle_seconds
        while self._nodes and next(iter(self._nodes.values())) < oldest_use:
            self._evict()

    def _evict(self) -> None:
        leaf, _ = self._nodes.popitem(last=False)
        assert leaf.parent is not None  # noqa: S101  (for the type checker: the root is not among the nodes)
        del leaf.parent.children[leaf.key]
        self.size_bytes -= leaf.size_bytes


def _key(tenant: str, ids: Sequence[int], at: int) -> _Key:
    return ids[at] if at else (tenant, ids[at])


def _common(node_ids: Sequence[int], ids: Sequence[int], at: int) -> int:
    """Number of leading tokens that `node_ids` shares with `ids` from position `at`."""
    for step, (ours, theirs) in enumerate(zip(node_ids, ids[at : at + len(node_ids)], strict=False)):
        if ours != theirs:
            return step
    return min(len(node_ids), len(ids) - at)

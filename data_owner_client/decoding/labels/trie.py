"""The prefix tree of a task's labels, as token ids."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from data_owner_client.adapter.candidates import index_of, token_set
from data_owner_client.data.label_tokens import LabelIds, require_distinct


@dataclass(frozen=True)
class LabelTrie:
    """The prefix tree of labels. Node 0 is the root, the others follow breadth first, and each leaf is a label.

    Attributes:
        parent_N: int64, each node's parent; 0 for the root itself.
        token_N: int64, token id that leads to each node; −1 for the root.
        depth_N: int64, tokens from the root to each node.
        labels_N: int64, labels at or below each node.
        leaf_L: int64, node of each label.
    """

    parent_N: Tensor
    token_N: Tensor
    depth_N: Tensor
    labels_N: Tensor
    leaf_L: Tensor

    @classmethod
    def from_ids(cls, labels: Sequence[str], label_ids: LabelIds) -> LabelTrie:
        """Build the tree.

        Args:
            labels: the labels, for messages.
            label_ids: token ids of each label.

        Raises:
            InvalidData: the tokens of a label begin with all tokens of another one, or are the same.
        """
        require_distinct(labels, label_ids)
        node_of = dict[tuple[int, ...], int]({(): 0})
        parent, token, depth = [0], [-1], [0]
        for length in range(1, max(map(len, label_ids)) + 1):
            for ids in label_ids:
                if len(ids) >= length and ids[:length] not in node_of:
                    node_of[ids[:length]] = len(parent)
                    parent.append(node_of[ids[: length - 1]])
                    token.append(ids[length - 1])
                    depth.append(length)
        leaves = [node_of[ids] for ids in label_ids]
        below = [0] * len(parent)
        for leaf in leaves:
            below[leaf] += 1
        for node in range(len(parent) - 1, 0, -1):
            below[parent[node]] += below[node]
        return cls(*map(torch.tensor, (parent, token, depth, below, leaves)))

    def __len__(self) -> int:
        return len(self.parent_N)

    @cached_property
    def children(self) -> list[list[int]]:
        """The children of each node."""
        children = defaultdict[int, list[int]](list)
        for node, parent in enumerate(self.parent_N.tolist()[1:], start=1):
            children[parent].append(node)
        return [children[node] for node in range(len(self))]

    @cached_property
    def is_inner_N(self) -> Tensor:
        """True for the nodes that have children."""
        return torch.tensor([bool(children) for children in self.children])

    @cached_property
    def token_ids_U(self) -> Tensor:
        """Sorted distinct token ids of all labels."""
        return token_set([self.token_N[1:]])

    @cached_property
    def token_index_N(self) -> Tensor:
        """Index among `token_ids_U` of the token that leads to each node; 0 for the root."""
        return index_of(self.token_N, self.token_ids_U).clamp(min=0)

    @cached_property
    def even_log_share_N(self) -> Tensor:
        """log of each node's part of its parent's labels, float64."""
        return self.labels_N.double().log() - self.labels_N[self.parent_N].double().log()

    def path(self, node: int) -> list[int]:
        """The nodes from the root's child to `node`; empty for the root."""
        nodes = []
        while node:
            nodes.append(node)
            node = int(self.parent_N[node])
        return nodes[::-1]

    def tokens(self, node: int) -> list[int]:
        """Token ids from the root to `node`."""
        return [int(self.token_N[each]) for each in self.path(node)]

    def path_sums(self, value_B_N: Tensor) -> Tensor:
        """The sum of the values of all nodes from the root's child to each node [B, N]; 0 for the root."""
        sum_B_N = value_B_N.clone()
        sum_B_N[:, 0] = 0.0
        for level in self._levels:
            sum_B_N[:, level] += sum_B_N[:, self.parent_N[level]]
        return sum_B_N

    @cached_property
    def _levels(self) -> list[slice]:
        """The nodes of each depth, from 1 on."""
        sizes = torch.bincount(self.depth_N).tolist()
        ends = torch.tensor(sizes).cumsum(0).tolist()
        return [slice(end - size, end) for size, end in zip(sizes[1:], ends[1:], strict=True)]

"""The prefix tree of a task's labels, as token ids."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from data_owner_client.adapter.candidates import index_of, token_set
from data_owner_client.data.pairs import Pair, Source, text_of
from data_owner_client.data.tasks import Task
from data_owner_client.plm.tokenizer import PlmTokenizer, Prompt
from protocol.errors import InvalidData

LabelIds = tuple[tuple[int, ...], ...]
"""Token ids of each label, in the order of the task, with the end of an answer behind it."""


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
        inner = set(parent)
        for label, leaf in zip(labels, leaves, strict=True):
            if below[leaf] > 1 or leaf in inner:
                raise _ambiguous(labels, label_ids, label)
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


class LabelTokenizer:
    """Tokenises the labels of a task behind prompts.

    Tokens of a label depend on the end of the prompt alone. So prompts share them that have the same text behind their
    source.

    Args:
        tokenizer: the PLM's tokenizer.
        labels: all labels.

    Raises:
        InvalidData: there are no labels, an empty one, or the same one twice.
    """

    def __init__(self, tokenizer: PlmTokenizer, labels: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self.labels = require_labels(labels)
        self._ids_behind: dict[str, LabelIds] = {}

    def check(self, task: Task) -> None:
        """Refuse labels that cannot be answers behind any text.

        Raises:
            InvalidData: a label holds the task's stop, or has the tokens of another one.
        """
        source = "."
        prompt = task.prompt(source, self._tokenizer)
        LabelTrie.from_ids(self.labels, self.behind(task, source, prompt, self._tokenizer.encode_prompt(prompt)))

    def behind(self, task: Task, source: Source, prompt: Prompt, prompt_ids: list[int]) -> LabelIds:
        """Token ids of each label behind a prompt.

        Args:
            task: task of the prompt.
            source: text or conversation in the prompt.
            prompt: the prompt as text.
            prompt_ids: the prompt as token ids.

        Raises:
            InvalidData: a label holds the task's stop.
        """
        text = text_of(source)
        tail = prompt.text.rpartition(text)[2] if text else ""
        if tail not in self._ids_behind or not tail:
            self._ids_behind[tail] = tuple(self._ids(task, source, prompt, prompt_ids, label) for label in self.labels)
        return self._ids_behind[tail]

    def _ids(self, task: Task, source: Source, prompt: Prompt, prompt_ids: list[int], label: str) -> tuple[int, ...]:
        pair = Pair(source, label) if isinstance(source, str) else Pair("", label, conversation=source)
        try:
            target = task.prompt_and_target(pair, self._tokenizer)[1]
        except InvalidData as error:
            raise InvalidData(f"The label {label!r} cannot be an answer: {error.detail}", hint=error.hint) from error
        return tuple(self._tokenizer.encode_target(prompt, prompt_ids, target))


def require_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """The labels, if they can be told apart.

    Raises:
        InvalidData: there are none, an empty one, or the same one twice.
    """
    if not labels:
        raise InvalidData(
            "The task names no labels to choose from.",
            hint='Write them into the task file: labels = ["spam", "ham"]; or use an adapter of this task.',
        )
    if any(not label.strip() for label in labels):
        raise InvalidData("A label of the task is empty.", hint="Give each label a text.")
    if twice := [label for label, count in Counter(labels).items() if count > 1]:
        raise InvalidData(f"The task names the label {twice[0]!r} twice.", hint="Write each label once.")
    return tuple(labels)


def _ambiguous(labels: Sequence[str], label_ids: LabelIds, label: str) -> InvalidData:
    """The error for a label with all of whose tokens another one begins."""
    own = label_ids[labels.index(label)]
    other = next(each for each, ids in zip(labels, label_ids, strict=True) if each != label and ids[: len(own)] == own)
    return InvalidData(
        f"The model's tokenizer cannot tell the labels {label!r} and {other!r} apart.",
        hint="Write one of them in another way.",
    )

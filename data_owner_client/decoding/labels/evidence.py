"""The distributions of PLM and adapter along the tree of labels, and the labels' probabilities in their mixture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from data_owner_client.adapter.interpolation import Interpolation, mix
from data_owner_client.decoding.labels.trie import LabelTrie
from data_owner_client.decoding.token_choice import TokenChoice

# Log-probability in place of −∞, so that sums over paths stay finite.
_IMPOSSIBLE = -1e6


@dataclass
class LabelEvidence:
    """Log-probabilities of the tokens in a tree of labels, for B texts.

    A node is computed where the context that ends with it was sent. Its children's tokens then have log-probabilities.

    Attributes:
        trie: tree of the labels, N nodes.
        expected_length_B: SL of each text in tokens, float64.
        is_computed_B_N: bool, the computed nodes.
        plm_logprob_B_N: log P_PLM of the token that leads to each node, float64.
        pema_logprob_B_N: log P_PEMA of this token, float64, −∞ where it is no candidate; None without an adapter.
        features_B_N_F: inputs of a gate at each computed node, float64; None where no gate is used.
        plm_top1_B_N: the PLM's most probable token behind each computed node.
        pema_top1_B_N: the adapter's most probable token behind each computed node.
    """

    trie: LabelTrie
    expected_length_B: Tensor
    is_computed_B_N: Tensor
    plm_logprob_B_N: Tensor
    pema_logprob_B_N: Tensor | None
    features_B_N_F: Tensor | None
    plm_top1_B_N: Tensor
    pema_top1_B_N: Tensor

    @classmethod
    def empty(
        cls, trie: LabelTrie, expected_lengths: Sequence[float], *, adapted: bool, features: int
    ) -> LabelEvidence:
        """The evidence before the first call.

        Args:
            trie: tree of the labels.
            expected_lengths: SL of each text, in tokens.
            adapted: whether there is an adapter.
            features: number of a gate's inputs; 0 for no gate.
        """
        shape = len(expected_lengths), len(trie)
        return cls(
            trie=trie,
            expected_length_B=torch.tensor(expected_lengths, dtype=torch.float64),
            is_computed_B_N=torch.zeros(shape, dtype=torch.bool),
            plm_logprob_B_N=torch.zeros(shape, dtype=torch.float64),
            pema_logprob_B_N=torch.zeros(shape, dtype=torch.float64) if adapted else None,
            features_B_N_F=torch.zeros(*shape, features, dtype=torch.float64) if features else None,
            plm_top1_B_N=torch.zeros(shape, dtype=torch.int64),
            pema_top1_B_N=torch.zeros(shape, dtype=torch.int64),
        )

    def lambdas(self, interpolation: Interpolation) -> Tensor:
        """λ behind each node, float64 [B, N]; without meaning for nodes that were not computed if there is a gate."""
        shape_B_N = self.is_computed_B_N.shape
        if self.pema_logprob_B_N is None:
            return torch.zeros(shape_B_N, dtype=torch.float64)
        if interpolation.gate is not None and self.features_B_N_F is not None:
            return interpolation.gate.lambdas(self.features_B_N_F.flatten(0, 1)).view(shape_B_N)
        t_B_N = self.trie.depth_N.expand(shape_B_N)
        length_B_N = self.expected_length_B[:, None].expand(shape_B_N)
        return interpolation.lambdas(t_B_N.flatten(), length_B_N.flatten()).view(shape_B_N)

    def node_logprobs(self, interpolation: Interpolation) -> Tensor:
        """log P of the tokens from the root to each node, float64 [B, N].

        Behind a node that was not computed, its probability is divided equally among its labels.
        """
        parent_N = self.trie.parent_N
        token_B_N = self.plm_logprob_B_N
        if self.pema_logprob_B_N is not None:
            token_B_N = mix(token_B_N, self.pema_logprob_B_N, self.lambdas(interpolation)[:, parent_N])
        known_B_N = self.is_computed_B_N[:, parent_N]
        token_B_N = torch.where(known_B_N, token_B_N.clamp(min=_IMPOSSIBLE), self.trie.even_log_share_N)
        return self.trie.path_sums(token_B_N)

    def label_logprobs(self, interpolation: Interpolation) -> Tensor:
        """log P of each label, its end included, float64 [B, L]: the sum over its tokens."""
        return self.node_logprobs(interpolation)[:, self.trie.leaf_L]

    def missing(self, interpolation: Interpolation, tolerance: float, temperature: float) -> Tensor:
        """The nodes to compute next, bool [B, N]; none where the labels' distribution is exact enough.

        The probability of a node bounds what its labels have together. So the labels behind all nodes that are left out
        have at most the share `tolerance` of the distribution, and none of them is the most probable one.

        Args:
            interpolation: mixture of PLM and adapter.
            tolerance: share of the distribution that may remain inexact; 0 for none.
            temperature: temperature of the distribution.
        """
        trie, computed_B_N = self.trie, self.is_computed_B_N
        reached_B_N = computed_B_N[:, trie.parent_N]
        reached_B_N[:, 0] = True
        frontier_B_N = reached_B_N & trie.is_inner_N & ~computed_B_N
        logprob_B_N = self.node_logprobs(interpolation)
        # At a temperature above 1, k labels with the sum m have at most k·(m/k)^(1/T); else they have at most m^(1/T).
        log_count_N = trie.labels_N.double().log() if temperature > 1 else torch.zeros(len(trie))
        bound_B_N = log_count_N + (logprob_B_N - log_count_N) / temperature
        is_leaf_B_N = reached_B_N & ~trie.is_inner_N
        weight_B_N = bound_B_N.masked_fill(~(frontier_B_N | is_leaf_B_N), -math.inf).softmax(dim=-1)
        weight_B_N = weight_B_N.masked_fill(~frontier_B_N, 0.0)
        ascending_B_N, order_B_N = weight_B_N.sort(dim=-1, stable=True)
        may_stay_B_N = torch.zeros_like(computed_B_N)
        may_stay_B_N.scatter_(1, order_B_N, ascending_B_N.cumsum(dim=-1) <= tolerance)
        missing_B_N = frontier_B_N & ~may_stay_B_N
        best_B_1 = logprob_B_N.masked_fill(~is_leaf_B_N, -math.inf).amax(dim=-1, keepdim=True)
        may_be_best_B_N = frontier_B_N & (logprob_B_N >= best_B_1)
        return torch.where(missing_B_N.any(dim=-1, keepdim=True), missing_B_N, may_be_best_B_N)

    def choices(self, text: int, label: int, interpolation: Interpolation) -> list[TokenChoice]:
        """The tokens of a label with their scores, for one text."""
        path, lambda_N = self.trie.path(int(self.trie.leaf_L[label])), self.lambdas(interpolation)[text]
        pema_B_N = self.pema_logprob_B_N
        return [
            TokenChoice(
                token=int(self.trie.token_N[node]),
                lambda_t=float(lambda_N[before]),
                plm_logprob=float(self.plm_logprob_B_N[text, node]),
                pema_logprob=None if pema_B_N is None else float(pema_B_N[text, node]),
                plm_token=int(self.plm_top1_B_N[text, before]),
                pema_token=None if pema_B_N is None else int(self.pema_top1_B_N[text, before]),
            )
            for before, node in pairwise([0, *path])
        ]

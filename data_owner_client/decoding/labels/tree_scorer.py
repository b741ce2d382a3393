"""Calls that compute the tree of labels where it matters, for the texts of a batch together.

Labels share their first tokens, and most of them get nearly no probability at these. So the tree is computed from its
root downwards, and branches whose labels cannot matter are left out. A sequence goes down from a branching node to the
next, and further along the branch that most texts so far took.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from data_owner_client.adapter.candidates import index_of
from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.adapter.gate import FEATURES, gate_features
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.decoding.adapter_mixture import plm_scores, previous_tokens
from data_owner_client.decoding.labels.evidence import LabelEvidence
from data_owner_client.decoding.labels.requests import LabelRequest
from data_owner_client.decoding.labels.trie import LabelTrie
from data_owner_client.decoding.response_rows import row_bytes
from data_owner_client.decoding.stats import TOKEN_ID_BYTES, GenerationStats
from data_owner_client.memory.request_batches import ExampleSizes, split_into_requests
from data_owner_client.plm.connection.base import Attempt
from data_owner_client.plm.remote_plm import RemotePlm
from protocol.head import LMHead
from protocol.messages import DecodeResponse
from protocol.quantization import dequantize
from protocol.timing import ServerTiming


@dataclass(frozen=True)
class _Sequence:
    """A path to send behind the prompt of one text.

    Attributes:
        text: index of the text in the batch.
        nodes: the nodes to compute, each the parent of the next.
    """

    text: int
    nodes: list[int]


class TreeScorer:
    """Scores one tree of labels for texts, batch by batch.

    Args:
        plm: the PLM.
        trie: tree of the labels.
        adapter: the data owner's adapter; None for the PLM alone.
        interpolations: mixtures for which the result is to be exact within the tolerance.
        stats: counts and times, which are added up.
    """

    def __init__(
        self,
        plm: RemotePlm,
        trie: LabelTrie,
        adapter: CandidateDistribution | None,
        interpolations: Sequence[Interpolation],
        stats: GenerationStats,
    ) -> None:
        self._plm = plm
        self._trie = trie
        self._adapter = adapter
        self._interpolations = interpolations
        self._stats = stats
        self._has_gate = adapter is not None and any(each.gate is not None for each in interpolations)
        self._head = _label_head(plm, adapter, trie.token_ids_U)
        # Texts that took each branch so far; a label of each node to begin with.
        self._visits_N = trie.labels_N.double()
        # Token ids of a path never change, and are needed at every row.
        self._tokens = [trie.tokens(node) for node in range(len(trie))]

    def score(self, requests: Sequence[LabelRequest], tolerance: float, temperature: float) -> LabelEvidence:
        """The evidence for some texts, with one round of calls for each level of the tree that matters."""
        started = time.perf_counter()
        waited_before = self._stats.server_s + self._stats.network_s
        evidence = LabelEvidence.empty(
            self._trie,
            [request.expected_length or 1.0 for request in requests],
            adapted=self._adapter is not None,
            features=FEATURES if self._has_gate else 0,
        )
        while (missing_B_N := self._missing(evidence, tolerance, temperature)).any():
            for run in self._runs(requests, self._sequences(evidence, missing_B_N)):
                self._compute(requests, run, evidence)
        logprob_B_N = evidence.node_logprobs(self._interpolations[0])
        self._visits_N += (logprob_B_N - logprob_B_N[:, self._trie.leaf_L].logsumexp(-1, True)).exp().sum(dim=0)
        waited_s = self._stats.server_s + self._stats.network_s - waited_before
        self._stats.client_s += time.perf_counter() - started - waited_s
        return evidence

    def _missing(self, evidence: LabelEvidence, tolerance: float, temperature: float) -> Tensor:
        """The nodes to compute next, bool [B, N]."""
        if tolerance == 0.0:
            return self._trie.is_inner_N & ~evidence.is_computed_B_N
        missing = [evidence.missing(each, tolerance, temperature) for each in self._interpolations]
        return torch.stack(missing).any(dim=0)

    def _sequences(self, evidence: LabelEvidence, missing_B_N: Tensor) -> list[_Sequence]:
        """Paths that cover the missing nodes, the deepest first, so that no node is computed twice."""
        sequences, parent, limit = list[_Sequence](), self._trie.parent_N.tolist(), self._plm.card.limits.max_rows
        lowest = self._lowest_nodes()
        for text, missing_N in enumerate(missing_B_N):
            done = set(evidence.is_computed_B_N[text].nonzero()[:, 0].tolist())
            ends = {lowest[node] for node in missing_N.nonzero()[:, 0].tolist()}
            for end in sorted(ends, key=lambda node: (-len(self._tokens[node]), node)):
                nodes = []
                while end not in done:
                    nodes.append(end)
                    done.add(end)
                    end = parent[end]
                nodes.reverse()
                sequences += [_Sequence(text, nodes[at : at + limit]) for at in range(0, len(nodes), limit)]
        return sequences

    def _lowest_nodes(self) -> list[int]:
        """For each node, the last inner node on the most visited way down from it."""
        visits, lowest = self._visits_N.tolist(), list(range(len(self._trie)))
        for node in reversed(range(len(self._trie))):
            if children := self._trie.children[node]:
                child = max(children, key=visits.__getitem__)
                lowest[node] = lowest[child] if self._trie.children[child] else node
        return lowest

    def _runs(self, requests: Sequence[LabelRequest], sequences: Sequence[_Sequence]) -> Iterable[list[_Sequence]]:
        """The sequences of each call, within the server's limits."""
        sizes = ExampleSizes()
        for each in sequences:
            request, end = requests[each.text], len(self._tokens[each.nodes[-1]])
            sizes.append(max(len(request.prompt), len(request.adapter_prompt or ())) + end, len(each.nodes))
        parts = split_into_requests(sizes, self._plm.card, self._plm.dtype, done=0, examples_per_shard=len(sequences))
        return ([sequences[i] for i in part] for part in parts)

    def _compute(self, requests: Sequence[LabelRequest], run: Sequence[_Sequence], evidence: LabelEvidence) -> None:
        """Compute the nodes of some sequences with one call, or two behind different prompts."""
        prompts = [list(requests[each.text].prompt) for each in run]
        own = [requests[each.text].adapter_prompt for each in run]
        response = self._decode(prompts, run)
        adapter_response = response
        if self._adapter is not None and any(prompt is not None for prompt in own):
            behind = [prompt if mine is None else list(mine) for prompt, mine in zip(prompts, own, strict=True)]
            adapter_response = self._decode(behind, run)
        at_R = [(each.text, node) for each in run for node in each.nodes]
        self._store(at_R, response, adapter_response, evidence)

    def _decode(self, prompts: Sequence[list[int]], run: Sequence[_Sequence]) -> DecodeResponse:
        """The response for the nodes of some sequences, counted and timed."""
        timings = list[ServerTiming]()

        def note(attempt: Attempt) -> None:
            if attempt.timing is not None:
                timings.append(attempt.timing)

        ids = [prompt + self._tokens[each.nodes[-1]] for prompt, each in zip(prompts, run, strict=True)]
        starts = [len(row) - len(each.nodes) for row, each in zip(ids, run, strict=True)]
        began = time.perf_counter()
        with self._plm.observed_by(note):
            response = self._plm.decode(ids, [0] * len(ids), from_position=starts)
        stats = self._stats
        stats.add_wait(time.perf_counter() - began, reduce(add, timings) if timings else None)
        stats.calls += 1
        stats.round_trips += len(ids)
        stats.label_prefixes += len(ids)
        stats.label_tokens += sum(map(len, ids))
        stats.bytes_sent += TOKEN_ID_BYTES * sum(map(len, ids))
        stats.bytes_received += row_bytes(response)
        return response

    def _store(
        self,
        at_R: Sequence[tuple[int, int]],
        response: DecodeResponse,
        adapter_response: DecodeResponse,
        evidence: LabelEvidence,
    ) -> None:
        """Write the rows of a response into the evidence.

        Args:
            at_R: text and node of each row.
            response: response behind the PLM's prompts.
            adapter_response: response behind the adapter's prompts.
            evidence: evidence to complete.
        """
        text_R, node_R = torch.tensor(at_R).T
        children_R = [self._trie.children[node] for _, node in at_R]
        row_S = torch.arange(len(at_R)).repeat_interleave(torch.tensor([len(each) for each in children_R]))
        child_S = torch.tensor([child for each in children_R for child in each])
        text_S, token_S = text_R[row_S], self._trie.token_index_N[child_S]
        evidence.plm_logprob_B_N[text_S, child_S] = self._plm_logprobs(response)[row_S, token_S]
        evidence.plm_top1_B_N[text_R, node_R] = response.top1_N
        evidence.is_computed_B_N[text_R, node_R] = True
        if self._adapter is None or evidence.pema_logprob_B_N is None:
            return
        ids_C = self._adapter.candidate_ids_C
        cr_R_D = dequantize(adapter_response.cr_N_D, adapter_response.cr_scale_N)
        pema_R_C = self._adapter.logprobs(cr_R_D, previous_tokens([self._tokens[node] for _, node in at_R]))
        candidate_S = index_of(self._trie.token_ids_U, ids_C)[token_S]
        pema_S = pema_R_C[row_S, candidate_S.clamp(min=0)].double().masked_fill(candidate_S < 0, -math.inf)
        evidence.pema_logprob_B_N[text_S, child_S] = pema_S
        evidence.pema_top1_B_N[text_R, node_R] = ids_C[pema_R_C.argmax(dim=-1)]
        if evidence.features_B_N_F is not None:
            plm_R_C = plm_scores(self._adapter.head, response).logprob_N_C
            features_R_F = gate_features(plm_R_C, pema_R_C, self._trie.depth_N[node_R])
            evidence.features_B_N_F[text_R, node_R] = features_R_F

    def _plm_logprobs(self, response: DecodeResponse) -> Tensor:
        """log P_PLM of the labels' tokens at each row, float64 [R, U]."""
        ids_U = self._trie.token_ids_U
        logprob_R_U = plm_scores(self._head, response).logprob_N_C.double()
        # Rows that travelled as float16 must not make another token seem likelier to the PLM than its own top-1.
        top1_R_1 = response.top1_logprob_N.double()[:, None]
        return torch.where(ids_U == response.top1_N[:, None], top1_R_1, logprob_R_U.minimum(top1_R_1))


def _label_head(plm: RemotePlm, adapter: CandidateDistribution | None, token_ids_U: Tensor) -> LMHead:
    """LM-head rows of the labels' tokens: the adapter's where it has all of them, else requested once."""
    if adapter is not None and bool((index_U := index_of(token_ids_U, adapter.candidate_ids_C)).min() >= 0):
        return adapter.head.rows(index_U)
    return plm.few_head_rows(token_ids_U)

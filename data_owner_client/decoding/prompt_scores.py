"""Scores of given tokens: exact log-probabilities of the mixture, and the choice of greedy decoding beside each.

The PLM's distribution of the candidates comes from their head rows, as in decoding. A token that is no candidate needs
its own row of the LM head. The choice is that of `token_selection`, also where a length reward makes it pass over a
stop. Log-probabilities have no length reward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_owner_client.adapter.candidates import index_of
from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.adapter.network import RECENT_TOKENS
from data_owner_client.decoding.adapter_mixture import AdapterMixture, head_input
from data_owner_client.decoding.choice_scores import choices_of, plm_choice, with_alternatives
from data_owner_client.decoding.decode_loop import PLM_ONLY
from data_owner_client.decoding.response_rows import rows_at
from data_owner_client.decoding.token_choice import DecodePosition, TokenChoice
from data_owner_client.memory.request_batches import ExampleSizes, split_into_requests
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.plm.token_logprobs import HeadRowCache, joined, token_logprobs
from protocol.errors import OverLimit
from protocol.head import LMHead
from protocol.messages import DecodeResponse
from protocol.quantization import dequantize

# In place of a token, behind the last one.
_NO_TOKEN = -1


@dataclass(frozen=True)
class TextToScore:
    """A text whose tokens are scored.

    Attributes:
        token_ids: the token ids, one at least.
        border: number of ids before the answer. λ is 0 for these, and t is counted from here.
        expected_length: SL of the answer, in tokens.
    """

    token_ids: Sequence[int]
    border: int = 0
    expected_length: float = 1.0


@dataclass(frozen=True)
class ScoredPosition:
    """A token of a text, and the token that greedy decoding chooses behind the same tokens.

    Attributes:
        choice: the token of greedy decoding, with alternatives if they were wanted.
        own: the text's token; the same object as `choice` where it is the same token. None behind the last token.
        penalty: nats that decoding takes from the log-probability of the own token, where that is a stop.
    """

    choice: TokenChoice
    own: TokenChoice | None
    penalty: float = 0.0

    @property
    def is_greedy(self) -> bool:
        """True if greedy decoding chooses the own token."""
        return self.own is self.choice

    @property
    def logprob(self) -> float:
        """log P of the own token under the mixture; of the choice, behind the last token.

        Only the choice has exactly its log-probability: another token that rounding made equal has the float below.
        """
        if self.own is None or self.is_greedy:
            return self.choice.logprob
        passed_over = self.penalty > 0 and self.own.logprob > self.choice.logprob
        return self.own.logprob if passed_over else min(self.own.logprob, self._below_choice)

    @property
    def ranked_logprob(self) -> float:
        """`logprob`, less the length reward if the token is a stop that was not chosen; below that of the choice."""
        if self.own is None or self.is_greedy:
            return self.choice.logprob
        return min(self.own.logprob - self.penalty, self._below_choice)

    def most_probable(self, count: int) -> list[tuple[int, float]]:
        """Tokens that no other token of the vocabulary exceeds in decoding, the choice first; `count` at most.

        Each has its log-probability, less the length reward if it is a stop that was not chosen.
        """
        best = self.choice.logprob
        others = self.choice.alternatives.mixture if self.choice.alternatives else []
        found = [(token, min(logprob, best)) for token, logprob in others if token != self.choice.token]
        return [(self.choice.token, best), *found][:count]

    @property
    def _below_choice(self) -> float:
        return math.nextafter(self.choice.logprob, -math.inf)


class PromptScorer:
    """Scores texts with one mixture. Retrieved examples do not apply: PLM and adapter see the texts as they are.

    Args:
        plm: the PLM.
        head_rows: rows of tokens that are no candidates.
        adapter: the data owner's adapter; None for the PLM alone.
        interpolation: mixture of both.
        stop_ids: tokens that end an answer, for the length reward.
        alternatives: most probable tokens to record at each position; 0 for none.
    """

    def __init__(
        self,
        plm: RemotePlm,
        head_rows: HeadRowCache,
        *,
        adapter: CandidateDistribution | None = None,
        interpolation: Interpolation = PLM_ONLY,
        stop_ids: frozenset[int] = frozenset(),
        alternatives: int = 0,
    ) -> None:
        self._plm = plm
        self._head_rows = head_rows
        self._interpolation = interpolation
        self._stop_ids = stop_ids
        self._alternatives = alternatives
        self._mixture: AdapterMixture | None = None
        if adapter is not None and not interpolation.finished(0, 1.0):
            self._mixture = AdapterMixture(adapter, interpolation, stop_ids)

    def score(self, texts: Sequence[TextToScore]) -> list[list[ScoredPosition]]:
        """The scored positions 1 to n of each text of n tokens. The last one is behind the text.

        The owner sees the texts.

        Raises:
            OverLimit: a text is too long for the server.
            PemaError: a call to the PLM failed.
        """
        self._require_fit(texts)
        scored: list[list[ScoredPosition]] = [[] for _ in texts]
        for run in self._runs(texts):
            response = self._plm.decode(
                [texts[number].token_ids[: rows.stop] for number, rows in run],
                [0] * len(run),
                from_position=[rows.start for _, rows in run],
            )
            at_N = [(number, row + 1) for number, rows in run for row in rows]
            for (number, _), position in zip(at_N, self._scored(texts, at_N, response), strict=True):
                scored[number].append(position)
        return scored

    def _require_fit(self, texts: Sequence[TextToScore]) -> None:
        limit = self._plm.card.limits.max_sequence_tokens
        longest = max((len(text.token_ids) for text in texts), default=0)
        if longest > limit:
            raise OverLimit(f"A text has {longest:,} tokens; the server takes {limit:,}.", hint="Shorten it.")

    def _runs(self, texts: Sequence[TextToScore]) -> Iterator[list[tuple[int, range]]]:
        """The texts with their rows in each call, within the server's limits."""
        sizes, parts, most = ExampleSizes(), list[tuple[int, range]](), self._plm.card.limits.max_rows
        for number, text in enumerate(texts):
            for start in range(0, len(text.token_ids), most):
                rows = range(start, min(start + most, len(text.token_ids)))
                parts.append((number, rows))
                sizes.append(rows.stop, len(rows))
        calls = split_into_requests(sizes, self._plm.card, self._plm.dtype, done=0, examples_per_shard=len(parts))
        return ([parts[index] for index in call] for call in calls)

    def _scored(
        self, texts: Sequence[TextToScore], at_N: Sequence[tuple[int, int]], response: DecodeResponse
    ) -> list[ScoredPosition]:
        """The scored positions of a response.

        Args:
            texts: all texts.
            at_N: text, and position in it, that each row of the response predicts.
            response: the response.
        """
        own_N = torch.tensor([_token(texts[number], at) for number, at in at_N])
        logprob_N = self._plm_logprobs(own_N, response)
        positions = [self._position(texts[number], at) for number, at in at_N]
        in_answer_N = torch.tensor([self._mixture is not None and at >= texts[number].border for number, at in at_N])
        pairs = dict[int, tuple[TokenChoice, TokenChoice]]()
        for row in (~in_answer_N).nonzero()[:, 0].tolist():
            choice = plm_choice(response, row, positions[row])
            pairs[row] = choice, TokenChoice(int(own_N[row]), 0.0, float(logprob_N[row]), None, choice.plm_token, None)
        if self._mixture is not None:
            # Several arrays of all candidates in float64 exist at a time.
            at_once = max(1, self._mixture.adapter.head.rows_per_chunk() // 8)
            for index_B in in_answer_N.nonzero()[:, 0].split(at_once):
                rows, part = rows_at(response, index_B), [positions[row] for row in index_B.tolist()]
                mixed = _mixed(self._mixture, rows, part, own_N[index_B], logprob_N[index_B])
                pairs |= dict(zip(index_B.tolist(), mixed, strict=True))
        return [self._scored_position(*pairs[row]) for row in range(len(at_N))]

    def _position(self, text: TextToScore, at: int) -> DecodePosition:
        """A position of a text, whose answer begins at its border."""
        t = at - text.border
        if t < 0 or self._mixture is None:
            return DecodePosition(0.0, max(t, 0), None, alternatives=self._alternatives)
        length = torch.tensor([text.expected_length], dtype=torch.float64)
        lambda_t = float(self._interpolation.lambdas(torch.tensor([t]), length))
        recent = text.token_ids[max(text.border, at - RECENT_TOKENS) : at]
        return DecodePosition(lambda_t, t, None, recent, alternatives=self._alternatives)

    def _plm_logprobs(self, own_N: Tensor, response: DecodeResponse) -> Tensor:
        """log P_PLM of a token at each row, float64; that of the top-1 where there is no token."""
        top1_logprob_N = response.top1_logprob_N.double()
        logprob_N = top1_logprob_N.clone()
        index_R = ((own_N != response.top1_N) & (own_N != _NO_TOKEN)).nonzero()[:, 0]
        if not len(index_R):
            return logprob_N
        ids_U, token_R = own_N[index_R].unique(return_inverse=True)
        rows = rows_at(response, index_R)
        found_R = token_logprobs(self._head_of(ids_U), head_input(rows), rows.logsumexp_N, token_R)
        # Rows that travelled as float16 must not make another token seem likelier to the PLM than its own top-1.
        logprob_N[index_R] = found_R.minimum(top1_logprob_N[index_R])
        return logprob_N

    def _head_of(self, ids_U: Tensor) -> LMHead:
        """LM-head rows of tokens: the adapter's, and those of the cache for tokens that are no candidates."""
        if self._mixture is None:
            return self._head_rows.rows(ids_U.tolist())
        adapter = self._mixture.adapter
        index_U = index_of(ids_U, adapter.candidate_ids_C)
        inside_U = index_U >= 0
        parts = [adapter.head.rows(index_U[inside_U])]
        if not bool(inside_U.all()):
            parts.append(self._head_rows.rows(ids_U[~inside_U].tolist()))
        order_U = torch.cat([inside_U.nonzero()[:, 0], (~inside_U).nonzero()[:, 0]])
        return joined(parts).rows(order_U.argsort())

    def _scored_position(self, choice: TokenChoice, own: TokenChoice) -> ScoredPosition:
        """The scored position of a choice and the scores of the own token."""
        if own.token == _NO_TOKEN:
            return ScoredPosition(choice, None)
        if own.token == choice.token:
            return ScoredPosition(choice, choice)
        is_candidate = own.pema_logprob is not None and own.pema_logprob > -math.inf
        penalised = is_candidate and own.lambda_t > 0 and own.token in self._stop_ids
        return ScoredPosition(choice, own, self._interpolation.length_reward if penalised else 0.0)


def _token(text: TextToScore, at: int) -> int:
    return text.token_ids[at] if at < len(text.token_ids) else _NO_TOKEN


def _mixed(
    mixture: AdapterMixture,
    response: DecodeResponse,
    positions: Sequence[DecodePosition],
    own_N: Tensor,
    plm_logprob_N: Tensor,
) -> list[tuple[TokenChoice, TokenChoice]]:
    """The choice at each position, and the scores of the own token."""
    cr_N_D = dequantize(response.cr_N_D, response.cr_scale_N)
    mixed, pema_logprob_N_C = mixture.at(response, positions, cr_N_D)
    choices = choices_of(mixed.most_probable(), mixed, pema_logprob_N_C)
    choices = with_alternatives(choices, mixed, pema_logprob_N_C, positions)
    return [*zip(choices, choices_of(own_N, mixed, pema_logprob_N_C, plm_logprob_N), strict=True)]

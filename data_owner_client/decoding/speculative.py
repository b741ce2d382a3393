"""Speculative decoding: rounds of calls to the server, and acceptance of their drafts by the mixture.

The server drafts tokens greedily from the PLM's distribution, or the client sends drafts that it found in texts. The
client selects the mixture's token at each drafted position. A token equal to the draft makes the next position valid.
The first difference stands, the drafts after it are discarded, and the next call continues from there. The text is the
same as without drafts.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, islice
from operator import mul

import torch

from data_owner_client.decoding.client_drafts import Drafter, DraftToken, NgramDrafter, PromptLookupDrafter
from data_owner_client.decoding.response_rows import rows_at
from data_owner_client.decoding.round_call import RoundResponse, call_server, drafted_tokens
from data_owner_client.decoding.sequence import SequenceState
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.decoding.stats import GenerationStats
from data_owner_client.decoding.token_choice import DecodePosition, OpenChoice, TokenChoice
from data_owner_client.plm.remote_plm import RemotePlm
from protocol.messages import DecodeResponse

# Drafts of the server for a sequence and round. Two were as fast as a planner by measured costs (docs/decisions/0011).
_LOOK_AHEAD = 2
# The same where λ is 0 to the end of all sequences: all drafts are accepted, and the texts still grow by pieces.
_PLM_ONLY_LOOK_AHEAD = 16
# Weight of the acceptance rate over all sequences against that of the sequence itself, in drafts.
_PRIOR_DRAFTS = 8.0
# Before measurements: how often the PLM's top-1 differed from the mixture's in a prototype.
_PRIOR_DISAGREEMENT = 0.45  # times λ
_PRIOR_WEIGHT = 8.0
_BUCKETS = 10


@dataclass
class AcceptanceStats:
    """Acceptance rate of the server's drafts, by λ.

    Attributes:
        drafted: drafts that the mixture checked, for λ from 0 to 1 in tenths.
        accepted: drafts that the mixture accepted, for λ from 0 to 1 in tenths.
    """

    drafted: list[int] = field(default_factory=lambda: [0] * (_BUCKETS + 1))
    accepted: list[int] = field(default_factory=lambda: [0] * (_BUCKETS + 1))

    def observe(self, lambda_t: float, *, accepted: bool) -> None:
        """Count one checked draft at this λ."""
        bucket = round(lambda_t * _BUCKETS)
        self.drafted[bucket] += 1
        self.accepted[bucket] += accepted

    def rate(self, lambda_t: float) -> float:
        """Probability that the mixture accepts a draft at this λ."""
        bucket = round(lambda_t * _BUCKETS)
        prior = 1.0 - _PRIOR_DISAGREEMENT * lambda_t
        return (self.accepted[bucket] + _PRIOR_WEIGHT * prior) / (self.drafted[bucket] + _PRIOR_WEIGHT)


class SpeculativeDecoder:
    """Rounds of sequences of any kind, with the acceptance rates learned from them.

    Each sequence has its own mixture, ends and settings, and may join and leave at any round.

    Args:
        plm: the remote PLM.
        settings: number of drafts of the server.
        lookup: drafter from fixed texts; None for none.
    """

    def __init__(self, plm: RemotePlm, settings: DecodingSettings, lookup: NgramDrafter | None = None) -> None:
        self._plm = plm
        self._look_ahead = _LOOK_AHEAD if settings.look_ahead is None else settings.look_ahead
        # Prompt-lookup drafts are cheap, but a fixed look-ahead disables them so that the user sets the exact number.
        self._drafters: list[Drafter] = [] if settings.look_ahead is not None else [PromptLookupDrafter()]
        self._drafters += [] if lookup is None else [lookup]
        self._acceptance = AcceptanceStats()
        self.stats = GenerationStats()

    def step(self, batch: Sequence[SequenceState]) -> None:
        """Extend every sequence by at least one token, with one call to the server."""
        started = time.perf_counter()
        drafts, most = [self._client_drafts(s) for s in batch], self._look_ahead
        if self._look_ahead and all(sequence.is_plm_only for sequence in batch):
            most = max(most, _PLM_ONLY_LOOK_AHEAD)
        look_ahead = [0 if row else min(most, self.max_look_ahead(s)) for s, row in zip(batch, drafts, strict=True)]
        answer = call_server(self._plm, batch, drafts, look_ahead)
        self.accept(answer)
        round_s = time.perf_counter() - started
        self.stats.add_wait(answer.waited_s, answer.timing)
        self.stats.client_s += round_s - answer.waited_s

    def max_look_ahead(self, sequence: SequenceState) -> int:
        """The number of tokens that the server may draft in one call."""
        return min(sequence.max_new_drafts, self._plm.card.limits.max_look_ahead)

    def _client_drafts(self, sequence: SequenceState) -> list[DraftToken]:
        """The client's drafts with the longest expected accepted run; none if the server's first is likelier."""
        options = [
            drafter.draft(sequence.prompt, sequence.generated, sequence.max_new_drafts) for drafter in self._drafters
        ]
        if sequence.answer is not None:
            options = [row[: sequence.answer.count_allowed([draft.token for draft in row])] for row in options]
        drafts = max(options, key=lambda row: sum(accumulate((draft.acceptance for draft in row), mul)), default=[])
        if drafts and self.max_look_ahead(sequence) and drafts[0].acceptance <= self._acceptance_at(sequence):
            return []
        return drafts

    def _acceptance_at(self, sequence: SequenceState) -> float:
        """Probability that the mixture accepts the server's next draft."""
        ratio = (_PRIOR_DRAFTS + sequence.accepts) / (_PRIOR_DRAFTS + sequence.expected_accepts)
        return min(1.0, ratio * self._acceptance.rate(sequence.lambdas[sequence.length]))

    def accept(self, answer: RoundResponse) -> None:
        """Append the mixture's tokens to every sequence, up to its first difference from the drafts."""
        answer.count()
        batch, response = answer.batch, answer.response
        counts = response.rows_B.tolist()
        self.stats.calls += 1
        self.stats.round_trips += len(batch)
        self.stats.drafted += sum(counts) - len(batch)
        tokens = drafted_tokens(answer.client_drafts, response)
        # The last token of a row follows the last draft: nothing is selected behind it.
        positions = [s.positions(row[:-1]) for s, row in zip(batch, tokens, strict=True)]
        choices = iter(_selected(batch, positions, response, answer.adapter_response))
        for sequence, client_drafts, row in zip(batch, answer.client_drafts, tokens, strict=True):
            accepted, length = 0, sequence.length
            for step, draft in enumerate(row):
                selected = next(choices)
                if accepted < step or sequence.end:
                    continue  # behind a difference, or the end
                choice = selected.resolve() if isinstance(selected, OpenChoice) else selected
                self._observe(sequence, choice)
                if step < len(client_drafts):
                    client_drafts[step].drafter.observe(client_drafts[step], accepted=choice.token == draft)
                sequence.append(choice)
                self.stats.accepted += step > 0
                accepted += choice.token == draft
            sequence.calls.tokens += sequence.length - length + max(0, len(client_drafts) - accepted)
            sequence.report()

    def _observe(self, sequence: SequenceState, choice: TokenChoice) -> None:
        """Learn the acceptance rate of the server's drafts."""
        same = choice.token == choice.plm_token
        sequence.expected_accepts += self._acceptance.rate(choice.lambda_t)
        sequence.accepts += same
        self._acceptance.observe(choice.lambda_t, accepted=same)


def _selected(
    batch: Sequence[SequenceState],
    positions: Sequence[Sequence[DecodePosition]],
    response: DecodeResponse,
    adapter_response: DecodeResponse | None,
) -> Sequence[TokenChoice | OpenChoice]:
    """The choice at each position, by the selector of its sequence."""
    adapter_response = adapter_response or response
    if len({id(s.selector) for s in batch}) == 1:
        return batch[0].selector.select(response, [*chain.from_iterable(positions)], adapter_response)
    rows = response.rows_B.tolist()
    starts, groups = [0, *accumulate(rows)], defaultdict[int, list[int]](list)
    for at, sequence in enumerate(batch):
        groups[id(sequence.selector)].append(at)
    choices: list[list[TokenChoice | OpenChoice]] = [[] for _ in batch]
    for members in groups.values():
        index_N = torch.tensor([row for at in members for row in range(starts[at], starts[at + 1])])
        own = rows_at(response, index_N)
        adapters = own if adapter_response is response else rows_at(adapter_response, index_N)
        selector, places = batch[members[0]].selector, [p for at in members for p in positions[at]]
        selected = iter(selector.select(own, places, adapters))
        for at in members:
            choices[at] = [*islice(selected, rows[at])]
    return [*chain.from_iterable(choices)]

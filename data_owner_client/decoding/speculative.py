"""Rounds of decoding: calls to the server, and what the mixture makes of the answers.

The server drafts tokens greedily from its own distribution, or the client offers drafts of its own, looked up in texts
that it has. The client takes the mixture's choice at each drafted position: as long as that is the draft itself, the
next position's representation is the right one; at the first difference the client's choice stands, the rest is thrown
away, and the next call goes on from there. The text is the same as without drafts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future
from dataclasses import astuple, dataclass, field
from functools import partial
from itertools import accumulate
from operator import mul

from data_owner_client.adapter.network import RECENT_TOKENS
from data_owner_client.decoding.client_drafts import Drafter, DraftToken, NgramDrafter, PromptLookupDrafter
from data_owner_client.decoding.draft_planning import (
    MOST_DRAFTS,
    AcceptanceStats,
    DraftPlan,
    RoundCostModel,
    plan_drafts,
)
from data_owner_client.decoding.sampling import Noise
from data_owner_client.decoding.token_selection import DecodePosition, TokenChoice, TokenSelector
from data_owner_client.plm.connection.base import Attempt
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.background import daemon_future
from protocol.messages import DecodeResponse
from protocol.timing import ServerTiming

# Drafts of the first rounds, until the costs are known, and for servers that do not tell them.
_UNMEASURED_LOOK_AHEAD = 2
# Calls for sequences that the server finishes alone, on their way at the same time.
_MOST_ENDING = 4
# What a sequence has shown of itself counts as much as all others together after so many drafts.
_OWN_WEIGHT = 8.0


@dataclass(frozen=True)
class DecodingSettings:
    """How to generate; of these only `max_new_tokens` can change a text.

    Attributes:
        max_new_tokens: longest continuation, in tokens.
        look_ahead: tokens that the server drafts per call while the adapter has a say; None to adapt it to each
            sequence's agreement and to the measured times, and to copy from the prompt where that pays more.
        batch_size: sequences in one call; one that ends makes room for the next.
    """

    max_new_tokens: int = 128
    look_ahead: int | None = None
    batch_size: int = 32


DEFAULT_DECODING = DecodingSettings()


@dataclass
class SequenceState:
    """One text as it grows.

    Attributes:
        number: of its prompt.
        prompt: token ids of the prompt that the PLM's distribution is taken behind.
        own_prompt: the same of the adapter's representations, where that is another one.
        lambdas: λ_t for every token that it may have.
        finished_at: the position from which on λ is 0 for good.
        expected: positions at which the mixture's choice was compared with the server's, each counted by the chance
            that they agree.
        agreed: those of them at which they did.
        noise: what its draws depend on, when sampling.
        choices: its tokens so far, and why.
        done: whether it ended, by a stop token or by length.
    """

    number: int
    prompt: list[int]
    lambdas: list[float]
    finished_at: int
    own_prompt: list[int] | None = None
    noise: Noise | None = None
    choices: list[TokenChoice] = field(default_factory=list)
    expected: float = 0.0
    agreed: int = 0
    done: bool = False

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self.choices)

    @property
    def generated(self) -> list[int]:
        """These tokens' ids."""
        return [choice.token for choice in self.choices]

    @property
    def context(self) -> list[int]:
        return self.prompt + self.generated

    def position(self, t: int, drafts: Sequence[int]) -> DecodePosition:
        """Where the choice of token t is made, if the drafts before it agree."""
        recent = [*(choice.token for choice in self.choices[-RECENT_TOKENS:]), *drafts]
        # Only draws look at the whole context.
        return DecodePosition(self.lambdas[t], t, self.noise, recent, [*self.context, *drafts] if self.noise else ())

    @property
    def most(self) -> int:
        """Tokens that may still be drafted, one more coming after them; negative if there is room for none."""
        return len(self.lambdas) - self.length - 1


@dataclass(frozen=True)
class RoundResponse:
    """What the server made of a call.

    Attributes:
        batch: the sequences asked about.
        offers: drafts of the client's own that were sent.
        own: the answer for the same tokens behind the adapter's own prompts, where it has such.
        waited_s: for the answer.
        timing: where the server says that the time went, that of both calls if there were two.
    """

    batch: Sequence[SequenceState]
    offers: Sequence[Sequence[DraftToken]]
    response: DecodeResponse
    own: DecodeResponse | None
    waited_s: float
    timing: ServerTiming | None


@dataclass
class GenerationStats:
    """What a generation took; usages add up.

    Attributes:
        tokens: generated.
        calls: to the server.
        round_trips: of all sequences: a call counts once for each sequence in it.
        drafted: tokens drafted by either side.
        accepted: of these, how many were kept.
        network_s: waited for the network.
        server_s: waited for the server.
        client_s: the client's own work.
    """

    tokens: int = 0
    calls: int = 0
    round_trips: int = 0
    drafted: int = 0
    accepted: int = 0
    network_s: float = 0.0
    server_s: float = 0.0
    client_s: float = 0.0

    def __add__(self, other: GenerationStats) -> GenerationStats:
        return GenerationStats(*(ours + theirs for ours, theirs in zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        """In words."""
        return (
            f"{self.tokens:,} tokens, {self.round_trips / max(1, self.tokens):.2f} round trips per token, "
            f"{self.accepted:,} of {self.drafted:,} drafts kept; waited {self.server_s:.1f} s for the server and "
            f"{self.network_s:.1f} s for the network, {self.client_s:.1f} s of own work"
        )


class SpeculativeDecoder:
    """Rounds of one generation, and what is learned from them."""

    def __init__(
        self,
        plm: RemotePlm,
        chooser: TokenSelector,
        stop_ids: frozenset[int],
        settings: DecodingSettings,
        lookup: NgramDrafter | None,
        on_token: Callable[[int, int], None] | None,
    ) -> None:
        self._plm = plm
        self._chooser = chooser
        self._stop_ids = stop_ids
        self._look_ahead = settings.look_ahead
        # Copying costs nothing but rows; still, who fixes the look-ahead wants no other drafts than he asks for.
        self._drafters: list[Drafter] = [] if settings.look_ahead is not None else [PromptLookupDrafter()]
        self._drafters += [] if lookup is None else [lookup]
        self._on_token = on_token
        self._agreement = AcceptanceStats()
        self._costs = RoundCostModel()
        self.usage = GenerationStats()

    def go_on(self, batch: Sequence[SequenceState]) -> None:
        """One call to the server for all sequences: every one of them grows by at least one token."""
        started = time.perf_counter()
        offers = [self._offers(s) for s in batch]
        drafts = self._plan(batch, offers)
        offers = [own[: d.offered] for own, d in zip(offers, drafts, strict=True)]
        begins = any(not s.choices for s in batch)
        answer = self.ask(batch, offers, [d.look_ahead for d in drafts])
        self.take_in(answer)
        round_s = time.perf_counter() - started
        timing, waited_s, usage = answer.timing, answer.waited_s, self.usage
        server_s = waited_s if timing is None else min(waited_s, timing.total_ms / 1000)
        usage.server_s += server_s
        usage.network_s += waited_s - server_s
        usage.client_s += round_s - waited_s
        # The first call runs what all prompts begin with, and may open the connection.
        if timing is not None and usage.calls > 1:
            rows = answer.response.rows_B.tolist()
            mixed = any(offers) and not all(offers)  # a pass for those with drafts of the client's own, and one without
            self._costs.learn(
                round_s=round_s,
                compute_s=timing.compute_ms / 1000,
                steps=max(count - len(own) for count, own in zip(rows, offers, strict=True)) + mixed,
                rows=sum(rows),
                begins=begins,
            )

    def ask(
        self, batch: Sequence[SequenceState], offers: Sequence[Sequence[DraftToken]], look_ahead: Sequence[int]
    ) -> RoundResponse:
        """The call alone, in any thread."""
        thread, timings = threading.get_ident(), list[ServerTiming | None]()

        def note(exchange: Attempt) -> None:
            if threading.get_ident() == thread:  # and not another call's
                timings.append(exchange.timing)

        asked = time.perf_counter()
        with self._plm.observed_by(note):
            response = self._plm.decode(
                [s.context + [o.token for o in own] for s, own in zip(batch, offers, strict=True)],
                look_ahead,
                sorted(self._stop_ids),
                from_position=[len(s.prompt) + s.length - 1 for s in batch],
            )
            timing = timings[-1] if timings else None  # the last exchange is the one that was answered
            own = self._behind_own_prompts(batch, offers, response)
            if own is not None and timing is not None and timings[-1] is not None:
                timing += timings[-1]
        return RoundResponse(batch, offers, response, own, time.perf_counter() - asked, timing)

    def _behind_own_prompts(
        self, batch: Sequence[SequenceState], offers: Sequence[Sequence[DraftToken]], response: DecodeResponse
    ) -> DecodeResponse | None:
        """The representations that the adapter was trained on, at the positions of an answer."""
        prompts = [s.own_prompt for s in batch if s.own_prompt is not None]
        if len(prompts) < len(batch) or all(s.length >= s.finished_at for s in batch):
            return None
        drafts = _drafts(offers, response)
        return self._plm.decode(
            [prompt + s.generated + own[:-1] for prompt, s, own in zip(prompts, batch, drafts, strict=True)],
            [0] * len(batch),
            from_position=[len(prompt) + s.length - 1 for prompt, s in zip(prompts, batch, strict=True)],
        )

    def rest(self, sequence: SequenceState) -> int:
        """The most tokens that the server may draft in one call."""
        return min(sequence.most, self._plm.card.limits.max_look_ahead)

    def _offers(self, sequence: SequenceState) -> list[DraftToken]:
        """The most promising drafts of the client's own."""
        found = [drafter.after(sequence.prompt, sequence.generated, sequence.most) for drafter in self._drafters]
        return max(found, key=lambda own: sum(accumulate((offer.chance for offer in own), mul)), default=[])

    def _plan(self, batch: Sequence[SequenceState], offers: Sequence[Sequence[DraftToken]]) -> list[DraftPlan]:
        """What is drafted of each sequence, by either side."""
        fixed = self._look_ahead
        offered = [[offer.chance for offer in own] for own in offers]
        if fixed is not None:
            return [self._fixed(s, own, fixed) for s, own in zip(batch, offered, strict=True)]
        if not self._costs.known:
            return [DraftPlan(look_ahead=min(_UNMEASURED_LOOK_AHEAD, self.rest(s))) for s in batch]
        chances = [[self._chance(s, s.length + step) for step in range(min(MOST_DRAFTS, self.rest(s)))] for s in batch]
        return plan_drafts(chances, offered, self._costs)

    def _fixed(self, sequence: SequenceState, offered: Sequence[float], look_ahead: int) -> DraftPlan:
        """The server drafts as much as was asked for, unless the client's own drafts are likelier to be agreed with."""
        if offered and offered[0] > self._chance(sequence, sequence.length):
            return DraftPlan(offered=len(offered))
        return DraftPlan(look_ahead=min(look_ahead, self.rest(sequence)))

    def _chance(self, sequence: SequenceState, position: int) -> float:
        """That the mixture agrees with the server's draft at a position, if it does with all before."""
        own = (_OWN_WEIGHT + sequence.agreed) / (_OWN_WEIGHT + sequence.expected)
        return min(1.0, own * self._agreement.rate(sequence.lambdas[position]))

    def take_in(self, answer: RoundResponse) -> None:
        """Append the mixture's tokens to every sequence, up to its first difference from the drafts."""
        batch, offers, response = answer.batch, answer.offers, answer.response
        counts = response.rows_B.tolist()
        self.usage.calls += 1
        self.usage.round_trips += len(batch)
        self.usage.drafted += sum(counts) - len(batch)
        drafts = _drafts(offers, response)
        positions = [
            s.position(s.length + step, own[:step])
            for s, own in zip(batch, drafts, strict=True)
            for step in range(len(own))
        ]
        answers = iter(self._chooser.choose(response, positions, answer.own or response))
        for sequence, own, row in zip(batch, offers, drafts, strict=True):
            kept = 0
            for step, draft in enumerate(row):
                choice = next(answers)
                if kept < step or sequence.done:
                    continue  # behind a difference, or the end
                chosen = choice.token
                sequence.expected += self._agreement.rate(choice.weight)
                sequence.agreed += chosen == choice.plm_token
                self._agreement.learn(choice.weight, agreed=chosen == choice.plm_token)
                if step < len(own):
                    own[step].drafter.learn(own[step], agreed=chosen == draft)
                sequence.choices.append(choice)
                if self._on_token is not None:
                    self._on_token(sequence.number, chosen)
                sequence.done = chosen in self._stop_ids or sequence.most < 0
                self.usage.accepted += step > 0
                kept += chosen == draft


def _drafts(offers: Sequence[Sequence[DraftToken]], response: DecodeResponse) -> list[list[int]]:
    """What each next position of an answer is conditioned on: the client's drafts, then the server's."""
    return [
        [*(offer.token for offer in own), *top1_K.tolist()[len(own) :]]
        for own, top1_K in zip(offers, response.top1_N.split(response.rows_B.tolist()), strict=True)
    ]


class PlmOnlyCalls:
    """Sequences that the server finishes alone, where λ is 0 for good: to the end in one call, beside the others'."""

    def __init__(self, rounds: SpeculativeDecoder, batch_size: int) -> None:
        self._rounds = rounds
        self._batch_size = batch_size
        self.calls: dict[Future[RoundResponse], int] = {}  # and how many sequences each has

    def begin(self, alone: list[SequenceState]) -> None:
        """Let the server finish some of these, which leave the list: a batch with those on their way."""
        room = self._batch_size - sum(self.calls.values())
        if not alone or room <= 0 or len(self.calls) >= _MOST_ENDING:
            return
        batch, alone[:] = alone[:room], alone[room:]
        rest = [self._rounds.rest(s) for s in batch]
        call = daemon_future(partial(self._rounds.ask, batch, [[]] * len(batch), rest))
        self.calls[call] = len(batch)

    def those_back(self, *, wait: bool) -> list[SequenceState]:
        """The sequences whose call was answered meanwhile; `wait` for one of them."""
        started = time.perf_counter()
        done = futures.wait(self.calls, None if wait else 0, futures.FIRST_COMPLETED).done
        self._rounds.usage.server_s += time.perf_counter() - started
        self.calls = {call: size for call, size in self.calls.items() if call not in done}
        answers = [call.result() for call in done]
        for answer in answers:
            self._rounds.take_in(answer)
        return [sequence for answer in answers for sequence in answer.batch]

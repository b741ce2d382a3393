"""The decode loop: from token ids of prompts to token ids of the mixture, batch by batch and round by round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.decoding.client_drafts import NgramDrafter
from data_owner_client.decoding.sampling import Noise
from data_owner_client.decoding.settings import DEFAULT_DECODING, DecodingSettings, SamplingSettings
from data_owner_client.decoding.speculative import GenerationStats, PlmOnlyCalls, SequenceState, SpeculativeDecoder
from data_owner_client.decoding.token_selection import TokenChoice, TokenSelector
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Bar, Reporter
from protocol.errors import InvalidData

_PLM_ONLY = Interpolation(schedule="none")


@dataclass(frozen=True)
class GenerationRequest:
    """One continuation to generate.

    Attributes:
        prompt: token ids behind which the PLM's distribution is taken.
        expected_length: SL in tokens; None only without an adapter.
        adapter_prompt: token ids behind which the adapter's representations are taken; None for `prompt`.
        sample: number of this continuation among those of the same prompt, for its noise; None for the most probable
            tokens even when sampling.
    """

    prompt: Sequence[int]
    expected_length: float | None = None
    adapter_prompt: Sequence[int] | None = None
    sample: int | None = 0

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longer prompt."""
        return max(len(self.prompt), len(self.adapter_prompt or ()))


@dataclass(frozen=True)
class Continuation:
    """The continuation of one prompt.

    Attributes:
        choices: its tokens with their scores, the stop token included.
    """

    choices: list[TokenChoice]

    @property
    def token_ids(self) -> list[int]:
        """Ids of the tokens."""
        return [choice.token for choice in self.choices]

    @property
    def logprob(self) -> float:
        """Log-probability of all tokens under the mixture, before temperature, penalties and filters."""
        return sum(choice.logprob for choice in self.choices)


def generate(
    plm: RemotePlm,
    requests: Sequence[GenerationRequest],
    *,
    adapter: CandidateDistribution | None = None,
    interpolation: Interpolation = _PLM_ONLY,
    stop_ids: frozenset[int],
    settings: DecodingSettings = DEFAULT_DECODING,
    sampling: SamplingSettings | None = None,
    lookup: NgramDrafter | None = None,
    on_token: Callable[[int, int], None] | None = None,
    reporter: Reporter | None = None,
) -> tuple[list[Continuation], GenerationStats]:
    """Continue prompts by the mixture; without an adapter, by the PLM alone.

    Args:
        plm: the PLM.
        requests: continuations to generate.
        adapter: the data owner's adapter, trained for this PLM; None for the PLM alone.
        interpolation: schedule or gate of λ.
        stop_ids: tokens that end a sequence.
        settings: length, look-ahead and batch size.
        sampling: settings of sampling; None for the most probable tokens. Draws from the whole vocabulary need all rows
            of the LM head, which are fetched unless the cache has them.
        lookup: drafter from fixed texts; None for none.
        on_token: called with the index of the request and the id of every final token; None for no call.
        reporter: shows the progress; None for none.

    Returns:
        The continuation of each request, in their order; and counts and times.

    Raises:
        InvalidData: a prompt is too long for the server, an expected length is missing, or candidates shall be drawn
            without an adapter.
    """
    _check(plm, requests, adapter, sampling)
    if adapter is None:
        interpolation = _PLM_ONLY
    limits = plm.card.limits
    sequences = []
    for number, request in enumerate(requests):
        room = min(settings.max_new_tokens, limits.max_sequence_tokens - request.longest_prompt)
        sequences.append(_sequence(number, request, interpolation, room, sampling))
        if adapter is not None and request.adapter_prompt is not None:
            sequences[-1].adapter_prompt = list(request.adapter_prompt)
    head = None
    if sampling is not None and not sampling.candidates_only:
        head = plm.full_head(reporter).to(torch.float32)
    selector = TokenSelector(adapter, head, interpolation, stop_ids, sampling)
    decoder = SpeculativeDecoder(plm, selector, stop_ids, settings, lookup, on_token)
    batch_size = max(1, min(settings.batch_size, limits.max_sequences, limits.max_rows // settings.max_new_tokens))
    with (reporter or Reporter()).bar("generating", len(sequences), "sequences") as bar:
        _run(decoder, sequences, batch_size, bar)
    decoder.stats.tokens = sum(s.length for s in sequences)
    return [Continuation(s.choices) for s in sequences], decoder.stats


def require_room(plm: RemotePlm, prompt: Sequence[int], *, label: str) -> None:
    """Require a prompt that leaves room for an answer.

    Raises:
        InvalidData: the prompt fills the server's limit.
    """
    limit = plm.card.limits.max_sequence_tokens
    if len(prompt) >= limit:
        raise InvalidData(
            f"The prompt of {label} has {len(prompt)} tokens, with nothing left for an answer: the server takes "
            f"{limit} for both.",
            hint="Shorten the text or use fewer examples in the task.",
        )


def _check(
    plm: RemotePlm,
    requests: Sequence[GenerationRequest],
    adapter: CandidateDistribution | None,
    sampling: SamplingSettings | None,
) -> None:
    """Require requests that can be answered.

    Raises:
        InvalidData: one cannot.
    """
    if adapter is not None and any(request.expected_length is None for request in requests):
        raise InvalidData("An expected length is missing.", hint="With an adapter, give that of every answer.")
    if adapter is None and sampling is not None and sampling.candidates_only:
        raise InvalidData(
            "Without an adapter there are no candidates to draw from.", hint="Give --adapter, or draw from all tokens."
        )
    for number, request in enumerate(requests):
        for prompt in (request.prompt, request.adapter_prompt or ()):
            require_room(plm, prompt, label=f"text {number + 1}")


def _sequence(
    number: int,
    request: GenerationRequest,
    interpolation: Interpolation,
    max_tokens: int,
    sampling: SamplingSettings | None,
) -> SequenceState:
    """The sequence of a request, with λ at each of its positions."""
    length, positions_T = request.expected_length or 1.0, torch.arange(max_tokens)
    lambdas = interpolation.lambdas(positions_T, torch.full((max_tokens,), length, dtype=torch.float64)).tolist()
    plm_only_from = next((t for t in range(max_tokens) if interpolation.finished(t, length)), max_tokens)
    sequence = SequenceState(number, list(request.prompt), lambdas, plm_only_from)
    if sampling is not None and request.sample is not None:
        sequence.noise = Noise(sampling.seed, sequence.prompt, request.sample)
        # The server drafts the most probable tokens, so it can finish alone only where these are wanted.
        sequence.plm_only_from = max_tokens
    return sequence


def _run(decoder: SpeculativeDecoder, sequences: Sequence[SequenceState], batch_size: int, bar: Bar) -> None:
    """Decode all sequences to their ends."""
    # Longest prompts first, or the last one to begin might be the longest.
    waiting = sorted(sequences, key=lambda s: len(s.prompt))
    active, plm_only = list[SequenceState](), list[SequenceState]()
    plm_only_calls = PlmOnlyCalls(decoder, batch_size)
    while waiting or active or plm_only or plm_only_calls.calls:
        while waiting and len(active) < batch_size:
            newest = waiting.pop()
            (plm_only if newest.plm_only_from == 0 else active).append(newest)
        plm_only_calls.begin(plm_only)
        extended: list[SequenceState] = []
        if active:
            decoder.step(active)
            extended, active = active, []
        extended += plm_only_calls.completed(wait=not extended)
        bar.advance(sum(s.done for s in extended))
        for sequence in extended:
            if not sequence.done:
                (active if sequence.length < sequence.plm_only_from else plm_only).append(sequence)

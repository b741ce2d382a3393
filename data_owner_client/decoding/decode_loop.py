"""The decode loop: from token ids of prompts to token ids of the mixture, batch by batch and round by round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.data.reading.problems import Origin, TextTooLong, text_origin
from data_owner_client.data.stops import StopMatcher, Stops
from data_owner_client.decoding.client_drafts import NgramDrafter
from data_owner_client.decoding.held.grammar import AnswerGrammar
from data_owner_client.decoding.held.selection import HeldSelection
from data_owner_client.decoding.held.token_search import TokenSearch
from data_owner_client.decoding.plm_only_calls import PlmOnlyCalls
from data_owner_client.decoding.sampling import Noise
from data_owner_client.decoding.sequence import End, EndRules, SequenceState
from data_owner_client.decoding.settings import DEFAULT_DECODING, DecodingSettings, SamplingSettings
from data_owner_client.decoding.speculative import SpeculativeDecoder
from data_owner_client.decoding.stats import GenerationStats
from data_owner_client.decoding.token_choice import TokenChoice
from data_owner_client.decoding.token_selection import TokenSelector
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Bar, Reporter
from protocol.errors import InvalidData
from protocol.head import LMHead

PLM_ONLY = Interpolation(schedule="none")
_NO_STOPS = Stops()


@dataclass(frozen=True)
class GenerationRequest:
    """One continuation to generate.

    Attributes:
        prompt: token ids behind which the PLM's distribution is taken.
        expected_length: SL in tokens; None only without an adapter.
        adapter_prompt: token ids behind which the adapter's representations are taken; None for `prompt`.
        sample: number of this continuation among those of the same prompt, for its noise; None for the most probable
            tokens even when sampling.
        length_bound: longest plausible answer in tokens; None for no bound.
        grammar: form of the answer, with the same stops; None for a free answer.
        prefix: ids of the tokens with which the answer begins.
        alternatives: most probable tokens of each side to record at each position; 0 for none.
    """

    prompt: Sequence[int]
    expected_length: float | None = None
    adapter_prompt: Sequence[int] | None = None
    sample: int | None = 0
    length_bound: int | None = None
    grammar: AnswerGrammar | None = None
    prefix: Sequence[int] = ()
    alternatives: int = 0

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longer prompt."""
        return max(len(self.prompt), len(self.adapter_prompt or ()))


@dataclass(frozen=True)
class Continuation:
    """The continuation of one prompt.

    Attributes:
        choices: its tokens with their scores, those of the stop included.
        text: its text before the stop.
        end: reason for its end.
    """

    choices: list[TokenChoice]
    text: str
    end: End

    @property
    def token_ids(self) -> list[int]:
        """Ids of the tokens."""
        return [choice.token for choice in self.choices]

    @property
    def logprob(self) -> float:
        """Log-probability of all tokens under the mixture, before temperature, penalties and filters."""
        return sum(choice.logprob for choice in self.choices)


@dataclass(frozen=True)
class GenerationConfig:
    """The distribution that texts are generated from, their ends, and the way there.

    Attributes:
        adapter: the data owner's adapter, trained for this PLM; None for the PLM alone.
        interpolation: schedule or gate of λ; without an adapter it is not used.
        stops: ends of the texts.
        repetition_limit: repeated tokens (`data.repetition`) at which a text ends; None for any number.
        settings: length, look-ahead and batch size.
        sampling: settings of sampling; None for the most probable tokens. Draws from the whole vocabulary need all rows
            of the LM head, which are fetched unless the cache has them.
        head: all rows of the LM head in float32, where the caller has them; None to fetch them for such draws.
        lookup: drafter from fixed texts; None for none.
        beams: beams of a beam search; 1 for none. They go over the whole vocabulary where `head` is given, or there is
            no adapter.
    """

    adapter: CandidateDistribution | None = None
    interpolation: Interpolation = PLM_ONLY
    stops: Stops = _NO_STOPS
    repetition_limit: int | None = None
    settings: DecodingSettings = DEFAULT_DECODING
    sampling: SamplingSettings | None = None
    head: LMHead | None = None
    lookup: NgramDrafter | None = None
    beams: int = 1

    @property
    def takes_any_token(self) -> bool:
        """True if texts are searched or drawn over the whole vocabulary, which needs all rows of the LM head."""
        if self.beams > 1:
            return self.adapter is None or self.head is not None
        return self.sampling is not None and not self.sampling.candidates_only


DEFAULT_GENERATION = GenerationConfig()


def generate(
    plm: RemotePlm,
    requests: Sequence[GenerationRequest],
    config: GenerationConfig = DEFAULT_GENERATION,
    *,
    on_token: Callable[[int, int], None] | None = None,
    reporter: Reporter | None = None,
) -> tuple[list[Continuation], GenerationStats]:
    """Continue prompts by the mixture; without an adapter, by the PLM alone.

    Args:
        plm: the PLM.
        requests: continuations to generate.
        config: distribution and ends of the texts.
        on_token: called with the index of the request and the id of every token, as soon as it is final; None for no
            call.
        reporter: shows the progress; None for none.

    Returns:
        The continuation of each request, in their order; and counts and times.

    Raises:
        InvalidData: a prompt is too long for the server, an expected length is missing, or candidates shall be drawn
            without an adapter.
    """
    sequences = sequences_of(plm, requests, config, reporter)
    if on_token is not None:
        for number, sequence in enumerate(sequences):
            sequence.on_choices = partial(_report_tokens, on_token, number)
    stats = run(plm, sequences, config.settings, config.lookup, reporter)
    return [continuation_of(sequence) for sequence in sequences], stats


def run(
    plm: RemotePlm,
    sequences: Sequence[SequenceState],
    settings: DecodingSettings,
    lookup: NgramDrafter | None = None,
    reporter: Reporter | None = None,
) -> GenerationStats:
    """Generate sequences to their ends; return counts and times.

    Args:
        plm: the PLM.
        sequences: sequences before their first tokens.
        settings: look-ahead and batch size.
        lookup: drafter from fixed texts; None for none.
        reporter: shows the progress; None for none.
    """
    decoder = SpeculativeDecoder(plm, settings, lookup)
    with (reporter or Reporter()).bar("generating", len(sequences), "sequences") as bar:
        _run(plm, decoder, sequences, largest_batch(plm, settings), bar)
    stats, ends = decoder.stats, [sequence.end for sequence in sequences]
    stats.tokens = sum(sequence.length for sequence in sequences)
    stats.add_bytes(sequence.calls for sequence in sequences)
    stats.unproven = sum({s.selector: s.selector.unproven for s in sequences}.values())
    stats.length_bound_ends, stats.repetition_ends = ends.count(End.LENGTH_BOUND), ends.count(End.REPETITION)
    return stats


def largest_batch(plm: RemotePlm, settings: DecodingSettings) -> int:
    """The number of sequences in a call that settings and server allow."""
    limits = plm.card.limits
    return max(1, min(settings.batch_size, limits.max_sequences, limits.max_rows // settings.max_new_tokens))


def sequences_of(
    plm: RemotePlm,
    requests: Sequence[GenerationRequest],
    config: GenerationConfig = DEFAULT_GENERATION,
    reporter: Reporter | None = None,
) -> list[SequenceState]:
    """The sequences of requests, before their first tokens. They have one selector in common.

    Args:
        plm: the PLM.
        requests: continuations to generate.
        config: distribution and ends of the texts.
        reporter: shows the progress of a download of the LM head; None for none.

    Raises:
        InvalidData: see `generate`.
    """
    adapter, sampling, settings = config.adapter, config.sampling, config.settings
    _check(plm, requests, adapter, sampling)
    interpolation = PLM_ONLY if adapter is None else config.interpolation
    rules = EndRules(StopMatcher(plm.tokenizer, config.stops), config.repetition_limit)
    head = None
    if config.takes_any_token:
        head = config.head or plm.full_head(reporter).to(torch.float32)
    held = HeldSelection(TokenSearch(plm))
    selector = TokenSelector(adapter, head, interpolation, rules.stops.ids, sampling, held)
    sequences = []
    for request in requests:
        room = min(settings.max_new_tokens, plm.card.limits.max_sequence_tokens - request.longest_prompt)
        sequences.append(_sequence(request, selector, interpolation, rules, room, sampling))
        if adapter is not None and request.adapter_prompt is not None:
            sequences[-1].adapter_prompt = list(request.adapter_prompt)
    return sequences


def continuation_of(sequence: SequenceState) -> Continuation:
    """The continuation of a sequence that has ended."""
    text = sequence.rules.stops.text(sequence.generated)
    return Continuation(sequence.choices, text, sequence.end or End.MAX_TOKENS)


def _report_tokens(on_token: Callable[[int, int], None], number: int, choices: Sequence[TokenChoice]) -> None:
    for choice in choices:
        on_token(number, choice.token)


def require_room(plm: RemotePlm, prompt: Sequence[int], origin: Origin) -> None:
    """Require a prompt that leaves room for an answer.

    Raises:
        TextTooLong: the prompt fills the server's limit.
    """
    limit = plm.card.limits.max_sequence_tokens
    if len(prompt) >= limit:
        raise TextTooLong(
            f"a prompt of {limit} or more tokens, with nothing left for an answer: the server takes {limit} for both",
            hint="Shorten the text or use fewer examples in the task.",
            origin=origin,
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
            require_room(plm, prompt, text_origin(number))


def _sequence(
    request: GenerationRequest,
    selector: TokenSelector,
    interpolation: Interpolation,
    rules: EndRules,
    max_tokens: int,
    sampling: SamplingSettings | None,
) -> SequenceState:
    """The sequence of a request, with λ at each of its positions."""
    end = End.MAX_TOKENS
    if request.length_bound is not None and request.length_bound < max_tokens:
        max_tokens, end = request.length_bound, End.LENGTH_BOUND
    length, positions_T = request.expected_length or 1.0, torch.arange(max_tokens)
    lambdas = interpolation.lambdas(positions_T, torch.full((max_tokens,), length, dtype=torch.float64)).tolist()
    plm_only_from = next((t for t in range(max_tokens) if interpolation.finished(t, length)), max_tokens)
    sequence = SequenceState(selector, list(request.prompt), lambdas, plm_only_from, rules, end)
    if sampling is not None and request.sample is not None:
        sequence.noise = Noise(sampling.seed, sequence.prompt, request.sample)
        # The server drafts the most probable tokens, so it can finish alone only where these are wanted.
        sequence.plm_only_from = max_tokens
    if request.grammar is not None:
        sequence.answer, sequence.plm_only_from = request.grammar.begin(), max_tokens
    sequence.alternatives = request.alternatives
    sequence.begin_with(request.prefix)
    return sequence


def _run(
    plm: RemotePlm, decoder: SpeculativeDecoder, sequences: Sequence[SequenceState], batch_size: int, bar: Bar
) -> None:
    """Decode all sequences to their ends."""
    # Longest prompts first, or the last one to begin might be the longest.
    waiting = sorted(sequences, key=lambda s: len(s.prompt))
    active, plm_only = list[SequenceState](), list[SequenceState]()
    plm_only_calls = PlmOnlyCalls(plm, decoder, batch_size)
    while waiting or active or plm_only or plm_only_calls.calls:
        while waiting and len(active) < batch_size:
            newest = waiting.pop()
            (plm_only if newest.is_plm_only else active).append(newest)
        plm_only_calls.begin(plm_only)
        extended: list[SequenceState] = []
        if active:
            decoder.step(active)
            extended, active = active, []
        extended += plm_only_calls.completed(wait=not extended)
        bar.advance(sum(s.end is not None for s in extended))
        for sequence in extended:
            if not sequence.end:
                (plm_only if sequence.is_plm_only else active).append(sequence)

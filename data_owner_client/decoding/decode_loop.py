"""Generating: prompts in, texts of the mixture out, batch by batch and round by round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.decoding.client_drafts import NgramDrafter
from data_owner_client.decoding.sampling import Noise, Sampling
from data_owner_client.decoding.speculative import (
    DEFAULT_DECODING,
    DecodingSettings,
    GenerationStats,
    PlmOnlyCalls,
    SequenceState,
    SpeculativeDecoder,
)
from data_owner_client.decoding.token_selection import TokenChoice, TokenSelector
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter
from protocol.errors import InvalidData

_ALONE = Interpolation(schedule="none")


@dataclass(frozen=True)
class Continuation:
    """What was generated after one prompt.

    Attributes:
        choices: its tokens, the stop token included, and how each of them was chosen.
    """

    choices: list[TokenChoice]

    @property
    def token_ids(self) -> list[int]:
        """The tokens alone."""
        return [choice.token for choice in self.choices]

    @property
    def logprob(self) -> float:
        """Of all tokens under the mixture, before temperature and the like."""
        return sum(choice.logprob for choice in self.choices)


def generate(
    plm: RemotePlm,
    prompts: Sequence[Sequence[int]],
    *,
    adapter: CandidateDistribution | None = None,
    interpolation: Interpolation = _ALONE,
    horizons: Sequence[float] | None = None,
    own_prompts: Sequence[Sequence[int]] | None = None,
    stop_ids: frozenset[int],
    settings: DecodingSettings = DEFAULT_DECODING,
    sampling: Sampling | None = None,
    samples: Sequence[int | None] | None = None,
    lookup: NgramDrafter | None = None,
    on_token: Callable[[int, int], None] | None = None,
    reporter: Reporter | None = None,
) -> tuple[list[Continuation], GenerationStats]:
    """Continue prompts by the mixture; without an adapter, by the PLM alone.

    Args:
        plm: the PLM.
        prompts: token ids.
        adapter: the data owner's adapter, trained for this very PLM.
        interpolation: schedule of λ.
        horizons: SL of every prompt, in tokens; needed with an adapter.
        own_prompts: token ids behind which the adapter's representations are taken, where these are other prompts than
            those behind which the PLM's distribution is.
        stop_ids: tokens after which a sequence has ended.
        settings: see there.
        sampling: how to draw tokens; None for the most probable ones. To draw from all of V it needs all rows of the LM
            head, which are fetched unless the cache has them.
        samples: of every prompt, the number of this continuation among those of the same prompt, 0 unless given; None
            for one of the most probable tokens, whatever `sampling` says.
        lookup: where the client looks for drafts of its own.
        on_token: told of every token as soon as it is certain: the number of its prompt, from 0, and its id.
        reporter: told of the progress.

    Returns:
        What follows each prompt, in their order; and what it took.

    Raises:
        InvalidData: a prompt is too long for the server, horizons are missing, or only known tokens shall be drawn and
            there is no adapter that knows any.
    """
    if adapter is None:
        interpolation = _ALONE
    elif horizons is None:
        raise InvalidData("An adapter was given without horizons.", hint="Give the expected length of every answer.")
    if adapter is None and sampling is not None and sampling.known_only:
        raise InvalidData(
            "Without an adapter there are no candidates to draw from.", hint="Give --adapter, or draw from all tokens."
        )
    limits = plm.card.limits
    for number, prompt in enumerate([*prompts, *(own_prompts or ())]):
        require_room(plm, prompt, place=f"text {number % len(prompts) + 1}")
    own: Sequence[Sequence[int] | None] = [None] * len(prompts)
    if adapter is not None and own_prompts is not None:
        own = own_prompts
    sequences = []
    for n, (prompt, own_prompt, horizon) in enumerate(zip(prompts, own, horizons or [1.0] * len(prompts), strict=True)):
        room = limits.max_sequence_tokens - max(len(prompt), len(own_prompt or ()))
        sequences.append(_begin(n, prompt, horizon, interpolation, min(settings.max_new_tokens, room)))
        sequences[-1].own_prompt = None if own_prompt is None else list(own_prompt)
    if sampling is not None:
        for sequence, sample in zip(sequences, samples or [0] * len(sequences), strict=True):
            if sample is not None:
                sequence.noise = Noise(sampling.seed, sequence.prompt, sample)
                # The server drafts the most probable tokens, so it can go on alone only where these are wanted.
                sequence.finished_at = len(sequence.lambdas)
    head = None
    if sampling is not None and not sampling.known_only:
        head = plm.full_head(reporter).to(torch.float32)
    chooser = TokenSelector(adapter, head, interpolation, stop_ids, sampling)
    rounds = SpeculativeDecoder(plm, chooser, stop_ids, settings, lookup, on_token)
    batch_size = max(1, min(settings.batch_size, limits.max_sequences, limits.max_rows // settings.max_new_tokens))
    # Longest prompts first, or the last one to begin might be the longest.
    waiting, active, alone = (
        sorted(sequences, key=lambda s: len(s.prompt)),
        list[SequenceState](),
        list[SequenceState](),
    )
    ending = PlmOnlyCalls(rounds, batch_size)
    with (reporter or Reporter()).bar("generating", len(sequences), "sequences") as bar:
        while waiting or active or alone or ending.calls:
            while waiting and len(active) < batch_size:
                newest = waiting.pop()
                (alone if newest.finished_at == 0 else active).append(newest)
            ending.begin(alone)
            came: list[SequenceState] = []
            if active:
                rounds.go_on(active)
                came, active = active, []
            came += ending.those_back(wait=not came)
            bar.advance(sum(s.done for s in came))
            for sequence in came:
                if not sequence.done:
                    (active if sequence.length < sequence.finished_at else alone).append(sequence)
    rounds.usage.tokens = sum(s.length for s in sequences)
    return [Continuation(s.choices) for s in sequences], rounds.usage


def require_room(plm: RemotePlm, prompt: Sequence[int], *, place: str) -> None:
    """Refuse a prompt that leaves no room for an answer.

    Raises:
        InvalidData: it does.
    """
    limit = plm.card.limits.max_sequence_tokens
    if len(prompt) >= limit:
        raise InvalidData(
            f"The prompt of {place} has {len(prompt)} tokens, with nothing left for an answer: the server takes "
            f"{limit} for both.",
            hint="Shorten the text or use fewer examples in the task.",
        )


def _begin(
    number: int, prompt: Sequence[int], horizon: float, interpolation: Interpolation, most_tokens: int
) -> SequenceState:
    positions_T = torch.arange(most_tokens)
    lambdas = interpolation.weights(positions_T, torch.full((most_tokens,), horizon, dtype=torch.float64)).tolist()
    finished_at = next((t for t in range(most_tokens) if interpolation.finished(t, horizon)), most_tokens)
    return SequenceState(number, list(prompt), lambdas, finished_at)

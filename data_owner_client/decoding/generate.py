"""The decoding loop: one call to the server for all sequences of a batch, several tokens a call.

The server drafts tokens greedily from its own distribution. The client takes the mixture's choice at each drafted
position: as long as that is the draft itself, the next position's representation is the right one; at the first
difference the client's choice stands, the rest is thrown away, and the next call goes on from there. The text is the
same as without drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from data_owner_client.adapter import TrainedAdapter
from data_owner_client.decoding.interpolation import Interpolation, PlmPositions, choose
from data_owner_client.plm import RemotePlm
from data_owner_client.progress import Reporter
from protocol.errors import InvalidData
from protocol.head import LMHead
from protocol.messages import DecodeResponse
from protocol.rows import expand

_ALONE = Interpolation(schedule="none")


@dataclass(frozen=True)
class DecodingSettings:
    """How to generate; of these only `max_new_tokens` can change a text.

    Attributes:
        max_new_tokens: longest continuation, in tokens.
        look_ahead: tokens that the server drafts per call while the adapter has a say. More saves round trips and costs
            the server more: about two thirds of the drafts agree.
        batch_size: sequences in one call; one that ends makes room for the next.
    """

    max_new_tokens: int = 128
    look_ahead: int = 2
    batch_size: int = 32


DEFAULT_DECODING = DecodingSettings()


@dataclass
class _Sequence:
    """One sequence as it grows.

    Attributes:
        prompt: token ids of the prompt.
        horizon: SL, its expected length in tokens.
        generated: token ids so far.
        done: whether it ended, by a stop token or by length.
    """

    prompt: list[int]
    horizon: float
    generated: list[int] = field(default_factory=list)
    done: bool = False


@dataclass(frozen=True)
class Usage:
    """What a generation took: tokens made, calls to the server, drafted tokens and how many of them were kept."""

    tokens: int
    calls: int
    drafted: int
    accepted: int


def generate(
    plm: RemotePlm,
    prompts: Sequence[Sequence[int]],
    *,
    adapter: TrainedAdapter | None = None,
    interpolation: Interpolation = _ALONE,
    horizons: Sequence[float] | None = None,
    stop_ids: frozenset[int],
    settings: DecodingSettings = DEFAULT_DECODING,
    reporter: Reporter | None = None,
) -> tuple[list[list[int]], Usage]:
    """Greedy decoding of the mixture; without an adapter, of the PLM alone.

    Args:
        plm: the PLM.
        prompts: token ids.
        adapter: the data owner's adapter, trained for this very PLM.
        interpolation: schedule of λ.
        horizons: SL of every prompt, in tokens; needed with an adapter.
        stop_ids: tokens after which a sequence has ended.
        settings: see there.
        reporter: told of the progress.

    Returns:
        The generated token ids, the stop token included, in the order of the prompts; and what it took.

    Raises:
        InvalidData: a prompt is too long for the server, or horizons are missing.
    """
    if adapter is None:
        interpolation = _ALONE
    elif horizons is None:
        raise InvalidData("An adapter was given without horizons.", hint="Give the expected length of every answer.")
    sequences = [
        _Sequence(list(prompt), horizon)
        for prompt, horizon in zip(prompts, horizons or [1.0] * len(prompts), strict=True)
    ]
    limits = plm.card.limits
    for number, sequence in enumerate(sequences, 1):
        if len(sequence.prompt) >= limits.max_sequence_tokens:
            raise InvalidData(
                f"Prompt {number} has {len(sequence.prompt)} tokens, with nothing left for an answer: the server takes "
                f"{limits.max_sequence_tokens} for both.",
                hint="Shorten the text or use fewer examples in the task.",
            )
    # Longest prompts first: sequences of similar length share a batch, so little of it is padding.
    batch_size = max(1, min(settings.batch_size, limits.max_sequences, limits.max_rows // settings.max_new_tokens))
    waiting, active = sorted(sequences, key=lambda s: len(s.prompt)), list[_Sequence]()
    calls = drafted = accepted = 0
    with (reporter or Reporter()).bar("generating", len(sequences), "sequences") as bar:
        while waiting or active:
            while waiting and len(active) < batch_size:
                active.append(waiting.pop())
            drafts = [_drafts(s, interpolation, settings, plm) for s in active]
            response = plm.decode([s.prompt + s.generated for s in active], drafts, sorted(stop_ids))
            kept = _advance(active, response, adapter, interpolation, stop_ids)
            calls += 1
            drafted += int(response.rows_B.sum()) - len(active)
            accepted += kept - len(active)
            for sequence in active:
                room = limits.max_sequence_tokens - len(sequence.prompt) - len(sequence.generated)
                sequence.done |= len(sequence.generated) >= settings.max_new_tokens or room <= 0
            bar.advance(sum(s.done for s in active))
            active = [s for s in active if not s.done]
    usage = Usage(sum(len(s.generated) for s in sequences), calls, drafted, accepted)
    return [s.generated for s in sequences], usage


def _drafts(sequence: _Sequence, interpolation: Interpolation, settings: DecodingSettings, plm: RemotePlm) -> int:
    """How many tokens to have drafted: to the end once the PLM goes on alone."""
    limits = plm.card.limits
    length = len(sequence.generated)
    room = limits.max_sequence_tokens - len(sequence.prompt) - length
    most = min(settings.max_new_tokens - length - 1, room, limits.max_look_ahead)
    return most if interpolation.finished(length, sequence.horizon) else min(settings.look_ahead, most)


def _advance(
    active: list[_Sequence],
    response: DecodeResponse,
    adapter: TrainedAdapter | None,
    interpolation: Interpolation,
    stop_ids: frozenset[int],
) -> int:
    """Append the mixture's tokens to every sequence, up to its first difference from the drafts; their number."""
    counts_B = response.rows_B
    chosen_N = response.top1_N
    if adapter is not None:
        starts_B = counts_B.cumsum(0) - counts_B
        step_N = torch.arange(int(counts_B.sum())) - starts_B.repeat_interleave(counts_B)
        position_N = step_N + torch.tensor([len(s.generated) for s in active]).repeat_interleave(counts_B)
        horizon_N = torch.tensor([s.horizon for s in active], dtype=torch.float64).repeat_interleave(counts_B)
        lambda_N = interpolation.weights(position_N, horizon_N)
        plm = plm_positions(adapter.head, response)
        chosen_N = choose(
            plm, adapter.logprobs(expand(response.cr_N_D, response.cr_scale_N)), adapter.candidate_ids_C, lambda_N
        )
    kept = 0
    rows = zip(chosen_N.split(counts_B.tolist()), response.top1_N.split(counts_B.tolist()), strict=True)
    for sequence, (chosen_K, draft_K) in zip(active, rows, strict=True):
        for chosen, draft in zip(chosen_K.tolist(), draft_K.tolist(), strict=True):
            sequence.generated.append(chosen)
            kept += 1
            sequence.done = chosen in stop_ids
            if sequence.done or chosen != draft:
                break
    return kept


def plm_positions(head: LMHead, response: DecodeResponse) -> PlmPositions:
    """The PLM's log-probabilities of the candidates from their head rows and the log-sum-exp over V."""
    if response.last_hidden_N_D is None:
        input_N_D = expand(response.cr_N_D, response.cr_scale_N)
    else:
        input_N_D = expand(response.last_hidden_N_D, response.last_hidden_scale_N)
    logprob_N_C = head.logits(input_N_D.float()) - response.logsumexp_N[:, None]
    return PlmPositions(logprob_N_C, response.top1_N, response.top1_logprob_N)

"""One call to the server for a round of sequences, behind the prompts of the PLM and those of the adapter."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch

from data_owner_client.decoding.client_drafts import DraftToken
from data_owner_client.decoding.response_rows import row_bytes, with_representations
from data_owner_client.decoding.sequence import SequenceState
from data_owner_client.decoding.stats import TOKEN_ID_BYTES
from data_owner_client.plm.connection.base import Attempt
from data_owner_client.plm.remote_plm import RemotePlm
from protocol.messages import DecodeResponse
from protocol.timing import ServerTiming


@dataclass(frozen=True)
class RoundResponse:
    """The server's response to one call.

    Attributes:
        batch: sequences in the call.
        client_drafts: drafts that the client sent, for each sequence.
        response: response behind the PLM's prompts.
        adapter_response: response for the same tokens behind the adapter's prompts; None where the prompts are equal.
        waited_s: seconds until the response.
        timing: times that the server reported, added up over both calls if there were two; None without a report.
    """

    batch: Sequence[SequenceState]
    client_drafts: Sequence[Sequence[DraftToken]]
    response: DecodeResponse
    adapter_response: DecodeResponse | None
    waited_s: float
    timing: ServerTiming | None

    def count(self) -> None:
        """Count the call for each of its sequences."""
        responses = [each for each in (self.response, self.adapter_response) if each is not None]
        received, rows = sum(map(row_bytes, responses)), self.response.rows_B.tolist()
        for sequence, drafts, own in zip(self.batch, self.client_drafts, rows, strict=True):
            prompts = [sequence.prompt, *([sequence.adapter_prompt] if sequence.adapter_prompt else [])]
            calls, shown = sequence.calls, sequence.length + len(drafts)
            calls.tokens += 0 if calls.round_trips else sum(map(len, prompts)) + sequence.length
            calls.round_trips += 1
            calls.bytes_sent += TOKEN_ID_BYTES * sum(len(prompt) + shown for prompt in prompts)
            calls.bytes_received += received * own // sum(rows)


def call_server(
    plm: RemotePlm,
    batch: Sequence[SequenceState],
    drafts: Sequence[Sequence[DraftToken]] | None = None,
    look_ahead: Sequence[int] | None = None,
) -> RoundResponse:
    """Make one call to the server; any thread may do so.

    Args:
        plm: the PLM.
        batch: sequences to extend.
        drafts: drafts of the client, for each sequence; None for no drafts.
        look_ahead: number of drafts of the server, for each sequence; None for no drafts.
    """
    drafts = [()] * len(batch) if drafts is None else drafts
    thread, timings = threading.get_ident(), list[ServerTiming]()

    def note(attempt: Attempt) -> None:
        # Leave out the calls of other threads, and attempts that were refused.
        if threading.get_ident() == thread and attempt.timing is not None:
            timings.append(attempt.timing)

    started = time.perf_counter()
    with plm.observed_by(note):
        response = plm.decode(
            [s.context + [draft.token for draft in row] for s, row in zip(batch, drafts, strict=True)],
            [0] * len(batch) if look_ahead is None else look_ahead,
            [] if look_ahead is None else _drafting_stops(batch),
            from_position=[len(s.prompt) + s.length - 1 for s in batch],
        )
        adapter_response = _behind_adapter_prompts(plm, batch, drafts, response)
    # A connection may divide a call into several.
    timing = reduce(add, timings) if timings else None
    return RoundResponse(batch, drafts, response, adapter_response, time.perf_counter() - started, timing)


def drafted_tokens(drafts: Sequence[Sequence[DraftToken]], response: DecodeResponse) -> list[list[int]]:
    """Token ids drafted for each row of a response: the client's drafts, then the server's."""
    return [
        [*(draft.token for draft in row), *top1_K.tolist()[len(row) :]]
        for row, top1_K in zip(drafts, response.top1_N.split(response.rows_B.tolist()), strict=True)
    ]


def _behind_adapter_prompts(
    plm: RemotePlm,
    batch: Sequence[SequenceState],
    drafts: Sequence[Sequence[DraftToken]],
    response: DecodeResponse,
) -> DecodeResponse | None:
    """The response for the same tokens behind the adapter's prompts; None where all are those of the PLM.

    Sequences without an adapter's prompt keep their rows, as do those where the adapter has no part any more.
    """
    prompts = [s.adapter_prompt if not s.is_plm_only else None for s in batch]
    tokens = drafted_tokens(drafts, response)
    places = [
        (prompt + s.generated + row[:-1], len(prompt) + s.length - 1)
        for prompt, s, row in zip(prompts, batch, tokens, strict=True)
        if prompt is not None
    ]
    if not places:
        return None
    own = plm.decode([ids for ids, _ in places], [0] * len(places), from_position=[start for _, start in places])
    if len(places) == len(batch):
        return own
    rows = response.rows_B.tolist()
    is_own = torch.tensor([prompt is not None for prompt in prompts]).repeat_interleave(torch.tensor(rows))
    return with_representations(response, is_own, own)


def _drafting_stops(batch: Sequence[SequenceState]) -> list[int]:
    """Ids of the tokens behind which the server drafts nothing more, in a call for these sequences."""
    return sorted(frozenset[int]().union(*{s.rules.stops.drafting_ids for s in batch}))

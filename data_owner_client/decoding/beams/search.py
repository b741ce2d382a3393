"""Beam search over the mixture: all beams of all texts of a batch grow by one token with each call to the server."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain, islice

from data_owner_client.decoding.beams.extensions import Extension
from data_owner_client.decoding.beams.hypotheses import TextBeams
from data_owner_client.decoding.decode_loop import Continuation, continuation_of, largest_batch
from data_owner_client.decoding.round_call import call_server
from data_owner_client.decoding.sequence import End, SequenceState
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.decoding.stats import GenerationStats
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter


def search_beams(
    plm: RemotePlm,
    sequences: Sequence[SequenceState],
    settings: DecodingSettings,
    *,
    beams: int,
    length_penalty: float,
    reporter: Reporter | None = None,
) -> tuple[list[list[Continuation]], GenerationStats]:
    """The best continuations of each sequence, the best first; and counts and times.

    There are as many as beams, or fewer where fewer tokens can follow. `TextBeams` has the rules.
    Nothing is drafted: all beams and the next tokens are in the calls of each step, one row for each beam. The server's
    prefix cache has the states that beams share.

    Args:
        plm: the PLM.
        sequences: sequences before their first tokens, with one selector, which has the whole LM head or an adapter.
        settings: batch size, and the length that it is bounded by.
        beams: beams of each sequence.
        length_penalty: exponent of the length in scores.
        reporter: shows the progress; None for none.

    Raises:
        NumericalFault: no token has a probability.
        PemaError: a call to the PLM failed.
    """
    stats, texts = GenerationStats(), [TextBeams(sequence, beams, length_penalty) for sequence in sequences]
    batch_size = largest_batch(plm, settings)
    # Longest prompts first, or the last one to begin might be the longest.
    waiting = sorted(texts, key=lambda text: len(text.live[0].sequence.prompt))
    active = list[TextBeams]()
    with (reporter or Reporter()).bar("searching", len(texts), "sequences") as bar:
        while waiting or active:
            while waiting and len(active) < max(1, batch_size // beams):
                active.append(waiting.pop())
            _step(plm, active, batch_size, beams, stats)
            going_on = [text for text in active if text.live]
            bar.advance(len(active) - len(going_on))
            active = going_on
    stats.tokens = stats.round_trips
    stats.add_bytes(sequence.calls for sequence in sequences)
    found = [[continuation_of(each.sequence) for each in text.hypotheses] for text in texts]
    ends = [continuations[0].end for continuations in found]
    stats.length_bound_ends, stats.repetition_ends = ends.count(End.LENGTH_BOUND), ends.count(End.REPETITION)
    return found, stats


def _step(plm: RemotePlm, texts: Sequence[TextBeams], batch_size: int, beams: int, stats: GenerationStats) -> None:
    """Let all beams of these texts grow by one token, with one call where all of them fit into a batch."""
    started, waited_s = time.perf_counter(), 0.0
    rows = [beam.sequence for text in texts for beam in text.live]
    extensions = list[list[Extension]]()
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        answer = call_server(plm, batch)
        answer.count()
        waited_s += answer.waited_s
        stats.add_wait(answer.waited_s, answer.timing)
        stats.calls += 1
        stats.round_trips += len(batch)
        positions = [*chain.from_iterable(sequence.positions([]) for sequence in batch)]
        adapter_response = answer.adapter_response or answer.response
        extensions += batch[0].selector.extensions(answer.response, positions, adapter_response, beams)
    remaining = iter(extensions)
    for text in texts:
        text.extend([*islice(remaining, len(text.live))])
        for beam in text.live:
            beam.sequence.calls.tokens += 1
    stats.client_s += time.perf_counter() - started - waited_s

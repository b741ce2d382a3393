"""Counts and times of a generation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass

from protocol.timing import ServerTiming

TOKEN_ID_BYTES = 4
"""Bytes of a token id on the wire."""


@dataclass
class CallCounts:
    """The calls to the server that one text took part in.

    Attributes:
        round_trips: number of calls.
        tokens: token ids that the server was shown: those of the prompts, the text and the client's rejected drafts.
        bytes_sent: bytes of the token ids of all calls.
        bytes_received: bytes of the rows that the server returned.
    """

    round_trips: int = 0
    tokens: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0

    def __add__(self, other: CallCounts) -> CallCounts:
        return CallCounts(*(ours + theirs for ours, theirs in zip(astuple(self), astuple(other), strict=True)))


@dataclass
class GenerationStats:
    """Counts and times of a generation; they can be added.

    Attributes:
        tokens: tokens generated, those of beams that were given up included.
        calls: calls to the server.
        round_trips: calls, counted once for each sequence in them.
        drafted: tokens drafted by either side.
        accepted: drafts that became part of a text.
        length_bound_ends: texts that ended at the length bound.
        repetition_ends: texts that ended at a repetition.
        unproven: tokens of held answers that were the best of the candidates, maybe not of all tokens.
        label_prefixes: prompts with a prefix of a label that were sent to score labels.
        label_tokens: tokens of these prompts and prefixes.
        bytes_sent: bytes of the token ids of all calls.
        bytes_received: bytes of the rows that the server returned.
        network_s: seconds waiting for the network.
        server_s: seconds waiting for the server.
        client_s: seconds of work on the client.
    """

    tokens: int = 0
    calls: int = 0
    round_trips: int = 0
    drafted: int = 0
    accepted: int = 0
    length_bound_ends: int = 0
    repetition_ends: int = 0
    unproven: int = 0
    label_prefixes: int = 0
    label_tokens: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    network_s: float = 0.0
    server_s: float = 0.0
    client_s: float = 0.0

    def __add__(self, other: GenerationStats) -> GenerationStats:
        return GenerationStats(*(ours + theirs for ours, theirs in zip(astuple(self), astuple(other), strict=True)))

    def add_wait(self, waited_s: float, timing: ServerTiming | None) -> None:
        """Divide the wait for a response between server and network.

        Args:
            waited_s: seconds until the response.
            timing: times that the server reported; None without a report, where all of it counts as the server's.
        """
        server_s = waited_s if timing is None else min(waited_s, timing.total_ms / 1000)
        self.server_s += server_s
        self.network_s += waited_s - server_s

    def add_bytes(self, texts: Iterable[CallCounts]) -> None:
        """Add the bytes of all calls that these texts took part in."""
        total = sum(texts, CallCounts())
        self.bytes_sent += total.bytes_sent
        self.bytes_received += total.bytes_received

    def __str__(self) -> str:
        """The counts and times in words."""
        counts = f"{self.tokens:,} tokens, {self.round_trips / max(1, self.tokens):.2f} round trips per token"
        # A beam search has none.
        counts += f", {self.accepted:,} of {self.drafted:,} drafts accepted" if self.drafted else ""
        if self.label_prefixes:
            counts = f"{self.label_prefixes:,} prefixes of labels behind their prompts, {self.label_tokens:,} tokens"
        return (
            f"{counts}; {self.server_s:.1f} s waiting for the server, {self.network_s:.1f} s for the network, "
            f"{self.client_s:.1f} s of work on this side{self._bounded}"
        )

    @property
    def _bounded(self) -> str:
        """The numbers of texts that ended at a bound and of unproven tokens, in words; empty if there are none."""
        unproven = [f"{self.unproven:,} tokens are the best of the candidates alone"] if self.unproven else []
        ends = [
            f"{texts:,} {'text' if texts == 1 else 'texts'} ended at {bound}"
            for texts, bound in ((self.length_bound_ends, "the length bound"), (self.repetition_ends, "a repetition"))
            if texts
        ]
        return f"; {', '.join([*ends, *unproven])}" if ends or unproven else ""

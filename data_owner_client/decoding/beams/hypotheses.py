"""The beams of one text, and the hypotheses that have ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from data_owner_client.decoding.beams.extensions import Extension
from data_owner_client.decoding.sequence import End, SequenceState
from protocol.errors import NumericalFault

# Ends by which a text is cut; it says nothing about the text's probability.
_CUTS = frozenset({End.LENGTH_BOUND, End.REPETITION})


@dataclass(frozen=True)
class Beam:
    """A text that grows.

    Attributes:
        sequence: its tokens.
        logprob: sum of its tokens' log-probabilities under the mixture, less the stop penalty.
    """

    sequence: SequenceState
    logprob: float


@dataclass(frozen=True)
class Hypothesis:
    """A text that has ended.

    Attributes:
        sequence: its tokens.
        score: log-probability of all its tokens over their number to the power of the length penalty. Of a text that
            ended at a repetition, the tokens include those that were removed.
    """

    sequence: SequenceState
    score: float

    @property
    def rank(self) -> tuple[bool, float]:
        """Key by which hypotheses are sorted: cut ones last, then the highest score first."""
        return self.sequence.end in _CUTS, -self.score


class TextBeams:
    """The beams of one text.

    The search is that of transformers with `early_stopping=False`. At each step all extensions of all beams are ranked
    by log-probability. The first `beams` of them become hypotheses if they end. The first `beams` that do not end go
    on. The search is done when there are as many hypotheses as beams, and the best beam at its present length has no
    higher score than any of them; or at full length.

    In transformers every text of full length competes by its score, and so it does here at `max_new_tokens`. Rules that
    transformers does not have cut a text: the length bound and the repetition limit. Such a text ranks behind all
    others, and does not count as a hypothesis for the end of the search.

    Args:
        sequence: the text before the search.
        beams: number of beams, at least one.
        length_penalty: exponent of the length in scores.

    Attributes:
        live: beams that grow, the most probable first.
        hypotheses: the best texts that have ended, at most as many as beams, the best first.
    """

    def __init__(self, sequence: SequenceState, beams: int, length_penalty: float) -> None:
        self.live = [Beam(sequence, 0.0)]
        self.hypotheses: list[Hypothesis] = []
        self._beams = beams
        self._length_penalty = length_penalty
        # Tokens that nobody chose have no part in the score.
        self._given = sequence.length

    def extend(self, extensions: Sequence[Sequence[Extension]]) -> None:
        """Let the beams grow by one token.

        Args:
            extensions: the tokens by which each beam may grow.

        Raises:
            NumericalFault: no token has a probability.
        """
        grown = [
            (beam.logprob + extension.logprob, beam.sequence, extension)
            for beam, row in zip(self.live, extensions, strict=True)
            for extension in row
        ]
        if not grown:
            raise NumericalFault("No token has a probability.", hint="The server or the adapter is damaged.")
        grown.sort(key=lambda each: -each[0])
        length, live = self._length + 1, list[Beam]()
        for rank, (logprob, parent, extension) in enumerate(grown):
            if rank >= self._beams and (len(live) == self._beams or parent.max_new_drafts == 0):
                break
            sequence = parent.fork()
            sequence.append(extension.choice)
            if sequence.end is None:
                live.append(Beam(sequence, logprob))
            elif rank < self._beams:
                self.hypotheses.append(Hypothesis(sequence, self._score(logprob, length)))
        self.hypotheses = sorted(self.hypotheses, key=lambda each: each.rank)[: self._beams]
        self.live = [] if self._is_settled(live, length) else live

    @property
    def _length(self) -> int:
        """Tokens of each beam, without those that were given."""
        return self.live[0].sequence.length - self._given

    def _is_settled(self, live: Sequence[Beam], length: int) -> bool:
        """True if no beam has a higher score than the worst hypothesis, by the heuristic of transformers."""
        if not live or len(self.hypotheses) < self._beams or self.hypotheses[-1].rank[0]:
            return False
        return self._score(live[0].logprob, length) <= self.hypotheses[-1].score

    def _score(self, logprob: float, length: int) -> float:
        return logprob / math.pow(length, self._length_penalty)

"""Repetition at the end of a growing text: a block of tokens that occurs again and again.

With a period of p tokens, a run is the longest end of the text in which each token equals the one p before it. The text
repeats itself if the run has at least 2p tokens: a block of p tokens then stands there three times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

_REPEATS = 2
"""Occurrences of a block after its first one."""


class RepetitionDetector:
    """Finds where a growing text begins to repeat itself.

    Attributes:
        longest_run: tokens of the longest run that ends the text; it may not be a repetition yet.
    """

    def __init__(self) -> None:
        self._positions: defaultdict[int, list[int]] = defaultdict(list)
        self._runs: dict[int, int] = {}  # by period
        self._length = 0
        self.longest_run = 0

    def copy(self) -> RepetitionDetector:
        """A detector of the same text, which may go on in another way."""
        other = RepetitionDetector()
        for token, positions in self._positions.items():
            other._positions[token] = [*positions]
        other._runs, other._length, other.longest_run = self._runs, self._length, self.longest_run
        return other

    def append(self, token: int) -> int:
        """Append a token, and return the number of repeated tokens that end the text; 0 for no repetition."""
        positions, at = self._positions[token], self._length
        self._runs = {at - earlier: self._runs.get(at - earlier, 0) + 1 for earlier in positions}
        positions.append(at)
        self._length += 1
        self.longest_run = max(self._runs.values(), default=0)
        return max((run for period, run in self._runs.items() if run >= _REPEATS * period), default=0)


def longest_repetition(texts: Iterable[Sequence[int]]) -> int:
    """Most repeated tokens anywhere in the texts, the first occurrence of each block left out; 0 for none."""
    longest = 0
    for ids in texts:
        detector = RepetitionDetector()
        longest = max([longest, *map(detector.append, ids)])
    return longest

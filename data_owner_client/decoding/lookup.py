"""Drafts of the client's own: what followed, in texts that it has, the tokens that were written last.

Such as the targets of a memory. The server checks all drafts in one forward pass, so they cost a row each and no step.
It sees the drafts, also those that are wrong: that discloses pieces of these texts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_ORDERS = (3, 2)  # tokens that must match, the more first
_MOST = 6
# Added to the number of times that a pattern was seen: what was seen once may not happen again.
_DOUBT = 1.0
_CALIBRATION_WEIGHT = 8.0


@dataclass(frozen=True)
class Offer:
    """A draft of the client's own, and the chance that the mixture agrees with it if it does with all before."""

    token: int
    chance: float


class Lookup:
    """Continuations of the last few tokens in given texts.

    Args:
        texts: token ids, such as the targets of a memory. Every run of two or three tokens in them is kept.
    """

    def __init__(self, texts: Iterable[Sequence[int]]) -> None:
        followers: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for ids in texts:
            for order in _ORDERS:
                for at in range(order, len(ids)):
                    followers[tuple(ids[at - order : at])][ids[at]] += 1
        self._best: dict[tuple[int, ...], Offer] = {}
        for key, counts in followers.items():
            ((token, count),) = counts.most_common(1)
            self._best[key] = Offer(token, count / (counts.total() + _DOUBT))
        self._accepted = 0
        self._expected = 0.0

    def after(self, generated: Sequence[int], most: int, *, better_than: float) -> list[Offer]:
        """Drafts for what comes next, for as long as each is likelier to be agreed with than `better_than`.

        Args:
            generated: the tokens generated so far.
            most: drafts wanted.
            better_than: the chance of the server's own next draft.
        """
        ids, offers = list(generated), list[Offer]()
        while len(offers) < min(most, _MOST):
            offer = self._next(ids)
            if offer is None or offer.chance * self._calibration <= better_than:
                break
            offers.append(offer)
            ids.append(offer.token)
        return offers

    def learn(self, offer: Offer, *, agreed: bool) -> None:
        """One draft that was looked at."""
        self._expected += offer.chance
        self._accepted += agreed

    @property
    def _calibration(self) -> float:
        """How much oftener the mixture agrees than the counts say."""
        return (self._accepted + _CALIBRATION_WEIGHT) / (self._expected + _CALIBRATION_WEIGHT)

    def _next(self, ids: Sequence[int]) -> Offer | None:
        for order in _ORDERS:
            if len(ids) >= order and (offer := self._best.get(tuple(ids[-order:]))) is not None:
                return offer
        return None

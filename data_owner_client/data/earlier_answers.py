"""Earlier answers of a conversation, which the prompts for its later answers show to the owner of the PLM."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from data_owner_client.data.pairs import Pair, PairSelection


def shows_earlier_answers(pair: Pair) -> bool:
    """Return True if the pair's prompt has an answer of the assistant, whether or not that is learned."""
    return pair.conversation is not None and pair.conversation.has_answers


def first_answers(pairs: Sequence[Pair]) -> Sequence[Pair]:
    """The pairs whose prompts show no earlier answer; the same sequence if all are."""
    index_N = array("q", (index for index, pair in enumerate(pairs) if not shows_earlier_answers(pair)))
    return pairs if len(index_N) == len(pairs) else PairSelection(pairs, index_N)

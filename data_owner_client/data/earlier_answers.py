"""Earlier answers of a conversation, which the prompts for its later answers show to the owner of the PLM."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from data_owner_client.data.pairs import Pair, PairSelection
from data_owner_client.runtime.progress import Reporter
from protocol.errors import InvalidData


def shows_earlier_answers(pair: Pair) -> bool:
    """Return True if the pair's prompt has an answer of the assistant, whether or not that is learned."""
    return pair.conversation is not None and pair.conversation.has_answers


def first_answers(pairs: Sequence[Pair]) -> Sequence[Pair]:
    """The pairs whose prompts show no earlier answer; the same sequence if all are."""
    index_N = array("q", (index for index, pair in enumerate(pairs) if not shows_earlier_answers(pair)))
    return pairs if len(index_N) == len(pairs) else PairSelection(pairs, index_N)


def without_earlier_answers(parts: Sequence[Sequence[Pair]], reporter: Reporter) -> list[Sequence[Pair]]:
    """The parts without pairs whose prompts show earlier answers, and a line about how many those are.

    Raises:
        InvalidData: nothing is left of a part.
    """
    shortened = [first_answers(part) for part in parts]
    before, after = sum(map(len, parts)), sum(map(len, shortened))
    if any(part and not rest for part, rest in zip(parts, shortened, strict=True)):
        raise InvalidData(
            "Every prompt of a file would show earlier answers of its conversation to the owner of the PLM.",
            hint="Say --share-earlier-answers if that is what you want, or give conversations from their beginning.",
        )
    if after < before:
        reporter.say(
            f"Only the first answer of each conversation is used: {before - after:,} of {before:,} answers are left "
            "out, as their prompts would show earlier answers. --share-earlier-answers takes all."
        )
    return shortened

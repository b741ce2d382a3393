"""Texts that cannot be answered, reported one by one or refused at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import TypeVar

from data_owner_client.data.pair_files import origin_of
from data_owner_client.data.pairs import Conversation, Source, text_of
from data_owner_client.data.reading.problems import Problems, require_unicode, text_origin
from protocol.errors import InvalidData

OnFailure = Callable[[int, InvalidData], None]
"""Called with the index of a text and the reason why it cannot be answered."""

_S = TypeVar("_S", str, Source)
_T = TypeVar("_T")


def list_of_texts(texts: Iterable[_S]) -> Sequence[_S]:
    """The texts of one call as a sequence.

    Raises:
        InvalidData: `texts` is a single text, whose characters would be answered one by one, or has no order.
    """
    if isinstance(texts, (str, bytes)):
        raise InvalidData("One text was given in place of several.", hint="Give a list with it.")
    if isinstance(texts, (Set, Mapping)):
        raise InvalidData(f"A {type(texts).__name__} was given in place of a list of texts.", hint="Give a list.")
    return texts if isinstance(texts, Sequence) else list(texts)


class TextFailures:
    """Failures of the texts of one call.

    Args:
        texts: all texts.
        on_failure: called for each failure; None to collect them for `settle`.
    """

    def __init__(self, texts: Sequence[Source], on_failure: OnFailure | None) -> None:
        self._texts = texts
        self._on_failure = on_failure
        self._problems = Problems()

    @contextmanager
    def caught(self, number: int) -> Iterator[None]:
        """Report or collect an `InvalidData` of the text with this index."""
        try:
            yield
        except InvalidData as error:
            if self._on_failure is None:
                self._problems.add(origin_of(self._texts, number), error)
            else:
                self._on_failure(number, error)

    def each(self, work: Callable[[int, Source], _T]) -> list[_T]:
        """The results of `work` for the index and text of all texts that are not blank and do not fail."""
        results = []
        for number, text in enumerate(self._texts):
            with self.caught(number):
                if not isinstance(text, Conversation):
                    require_unicode(text, "it", text_origin(number))
                if not _is_blank(text):
                    results.append(work(number, text))
        return results

    def settle(self, total: int) -> None:
        """Refuse all texts if failures were collected.

        Args:
            total: number of the texts.

        Raises:
            InvalidData: some failed.
        """
        self._problems.settle(total, skip=False)


def _is_blank(source: Source) -> bool:
    """True for a text without characters, and for a conversation whose last turn is the user's and has none.

    A tool's result may be empty.
    """
    if isinstance(source, Conversation) and source.turns[-1]["role"] != "user":
        return False
    return not text_of(source).strip()

"""Problems of texts, collected over a whole input and reported at once."""

from __future__ import annotations

import logging
from bisect import insort
from collections import Counter
from dataclasses import dataclass

from data_owner_client.runtime.path_text import PathText
from protocol.errors import InvalidData

_LISTED_LINES = 10
_LISTED_KINDS = 6
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Position of a text in the user's input.

    Attributes:
        name: name of the file; `text` or `pair` for those that come from no file.
        number: line of the file; without a file, number of the text or pair; from 1.
        in_file: whether `name` is that of a file.
    """

    name: str
    number: int
    in_file: bool = True

    def __str__(self) -> str:
        return f"{self.name}{':' if self.in_file else ' '}{self.number}"


def text_origin(index: int) -> Origin:
    """Position of a text that comes from no file.

    Args:
        index: its index, from 0.
    """
    return Origin("text", index + 1, in_file=False)


class InvalidText(InvalidData):
    """A text that cannot be used, while others of the same input can.

    Args:
        kind: what the text has, as it follows "has" or "with": `an empty target`. Equal problems have equal kinds.
        hint: one sentence that says what to do.
        origin: position of the text; None if the caller knows it.
    """

    def __init__(self, kind: str, *, hint: str, origin: Origin | None = None) -> None:
        super().__init__(f"{origin or 'A text'} has {kind}.", hint=hint)
        self.kind = kind


class TextTooLong(InvalidText):
    """A text that does not fit into the server's longest sequence, with its prompt and its answer."""


@dataclass(frozen=True, kw_only=True)
class ProblemKind:
    """All problems of one kind in one input.

    Attributes:
        kind: what the texts have, or a sentence about them.
        count: number of such texts.
        name: name of the file; `text` or `pair` for texts that come from no file.
        lines: lines of the first ones, or their numbers without a file, in their order, each once.
        more: whether there are others.
        hint: one sentence that says what to do.
    """

    kind: str
    count: int
    name: PathText
    lines: list[int]
    more: bool = False
    hint: str


class Problems:
    """Problems of one input: counts by kind and file, and the numbers of the first ones."""

    def __init__(self) -> None:
        # By name of the input, whether it is a file, and kind.
        self._counts = Counter[tuple[str, bool, str]]()
        self._numbers: dict[tuple[str, bool, str], list[int]] = {}
        self._cut = set[tuple[str, bool, str]]()  # those with more numbers
        self._hints: dict[str, str] = {}
        self._sentences = set[str]()  # kinds that are sentences of their own

    def __len__(self) -> int:
        return self._counts.total()

    def add(self, origin: Origin, error: InvalidData) -> None:
        """Add the problem of one text. Errors that are no `InvalidText` are of one kind if their details are equal."""
        kind = error.kind if isinstance(error, InvalidText) else error.detail.rstrip(".")
        if not isinstance(error, InvalidText):
            self._sentences.add(kind)
        key = (origin.name, origin.in_file, kind)
        self._counts[key] += 1
        numbers = self._numbers.setdefault(key, [])
        # The texts may come in another order, as a validation set is drawn from them.
        if origin.number not in numbers:
            insort(numbers, origin.number)
        if len(numbers) > _LISTED_LINES:
            numbers.pop()
            self._cut.add(key)
        self._hints.setdefault(kind, error.hint)

    def by_kind(self) -> list[ProblemKind]:
        """All problems by kind and file, the most frequent first."""
        return [
            ProblemKind(
                kind=key[2],
                count=count,
                name=key[0],
                lines=list(self._numbers[key]),
                more=key in self._cut,
                hint=self._hints[key[2]],
            )
            for key, count in self._counts.most_common()
        ]

    def settle(self, total: int, *, skip: bool) -> None:
        """Refuse the input if it has problems, or report how many texts are left out.

        Args:
            total: number of all texts, those with problems included.
            skip: leave out the texts that have problems.

        Raises:
            InvalidData: there are problems and `skip` is False, or no text is without one.
        """
        if not self._counts:
            return
        if len(self) >= total and skip:
            raise InvalidData(f"No text can be used: {self._listed()}.", hint=self._main_hint())
        if skip:
            _logger.warning("Left out %d of %d texts: %s.", len(self), total, self._listed())
            return
        advice = "Correct it" if len(self) == 1 else "Correct them"
        hint = f"{self._main_hint()} {advice}, or say --skip-invalid to go on without.".lstrip()
        raise InvalidData(self._summary(total), hint=hint)

    def _summary(self, total: int) -> str:
        if len(self) == 1:
            ((name, in_file, kind),) = self._counts
            origin = Origin(name, self._numbers[name, in_file, kind][0], in_file)
            return f"{origin}: {kind}." if kind in self._sentences else f"{origin} has {kind}."
        return f"{len(self):,} of {total:,} texts cannot be used: {self._listed()}."

    def _listed(self) -> str:
        parts = [
            f"{count:,} {'×' if kind in self._sentences else 'with'} {kind} ({self._places(name, in_file, kind)})"
            for (name, in_file, kind), count in self._counts.most_common(_LISTED_KINDS)
        ]
        more = len(self._counts) - len(parts)
        return "; ".join([*parts, f"and {more} other kinds"] if more else parts)

    def _places(self, name: str, in_file: bool, kind: str) -> str:
        numbers = self._numbers[name, in_file, kind]
        places = f"{name}:" if in_file else f"{name}{'s' if len(numbers) > 1 else ''} "
        more = ", …" if (name, in_file, kind) in self._cut else ""
        return places + ", ".join(map(str, numbers)) + more

    def _main_hint(self) -> str:
        """The hint of the most frequent kind."""
        ((_, _, kind), _) = self._counts.most_common(1)[0]
        return self._hints[kind]


def require_unicode(text: object, name: str, origin: Origin | None = None) -> None:
    """Refuse what is not a text, or cannot be encoded as UTF-8.

    Args:
        text: value to check.
        name: name of the value in the error, such as `target`.
        origin: position of the text; None if the caller knows it.

    Raises:
        InvalidText: it is no text, or has half of a surrogate pair.
    """
    if not isinstance(text, str):
        noun = _NOUNS.get(type(text), "another value")
        hint = "Quote it, if it is a text." if isinstance(text, int | float) else "Give a text."
        raise InvalidText(f"{noun} instead of a text in {name}", hint=hint, origin=origin)
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        raise InvalidText(
            f"half of a surrogate pair in {name}", hint="Write the whole character, as Unicode text.", origin=origin
        ) from None


def require_decoded(text: str) -> None:
    """Refuse a part of a file that has bytes outside of the file's encoding, which are read as lone surrogates.

    Raises:
        InvalidText: it has such bytes.
    """
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        raise InvalidText(
            "bytes that are not UTF-8", hint="Convert the file, for example: iconv -f WINDOWS-1252 -t UTF-8."
        ) from None


_NOUNS: dict[type, str] = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    bytes: "bytes",
}

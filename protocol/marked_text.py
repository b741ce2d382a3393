"""Text in which marked characters are special tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MarkedText:
    """A text of which only marked spans are special tokens. All else is plain text, whatever it spells.

    Attributes:
        text: the whole text.
        special_spans: start and end of every special token in `text`, in characters, in order and without overlap.
    """

    text: str
    special_spans: tuple[tuple[int, int], ...] = ()

    def __add__(self, other: MarkedText) -> MarkedText:
        shift = len(self.text)
        spans = tuple((start + shift, end + shift) for start, end in other.special_spans)
        return MarkedText(self.text + other.text, self.special_spans + spans)

    def without_special_tokens(self) -> str:
        """The plain text alone."""
        starts = [0, *(end for _, end in self.special_spans)]
        ends = [*(start for start, _ in self.special_spans), len(self.text)]
        return "".join(self.text[start:end] for start, end in zip(starts, ends, strict=True))

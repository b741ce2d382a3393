"""Text of the other side on a terminal."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from protocol.printable import printable_line


@given(text=st.text(st.characters(exclude_categories=["Cs"])), longest=st.integers(0, 50))
def test_any_text_is_one_printable_line(text: str, longest: int) -> None:
    line = printable_line(text, longest)
    assert line.isprintable()
    assert len(line) <= longest
    assert line.replace(" ", "") in "".join(each for each in text if each.isprintable()).replace(" ", "")


def test_words_and_errors_stay() -> None:
    assert printable_line("Größe: 1 ≥ 0, 日本") == "Größe: 1 ≥ 0, 日本"
    assert printable_line(ValueError("a\n\n  b")) == "a b"
    assert printable_line("\x1b[2J") == "[2J"

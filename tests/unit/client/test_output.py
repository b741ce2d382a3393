"""Results on standard output and in files: texts as they are, whole, one line each."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from data_owner_client.cli.doctor import Diagnosis, Finding
from data_owner_client.cli.output import json_line, print_diagnosis, print_record
from data_owner_client.runtime.console import print_table
from data_owner_client.runtime.resumable_output import one_line

# What a reader of rich's markup or emoji names would swallow, change or refuse.
TEXTS = ["m[draft]", "a[/b]", "[red]x[/red]", r"\[b]", ":heart:", "[link=x]", "Größe λ 日本"]
DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_shown_as_they_are(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_record({text: text, "in": {text: text}}, as_json=False, title=f"title {text}")
    assert capsys.readouterr().out.count(text) == 5
    print_diagnosis(Diagnosis(findings=[Finding(check=text, ok=False, detail=text, advice=text)]), title=text)
    shown = capsys.readouterr().out
    assert shown.count(text) == 4
    assert "✗" in shown
    table = Table(text, title=text)
    table.add_row(text)
    table.caption = text
    print_table(table, text)
    assert capsys.readouterr().out.count(text) == 5
    print_record({text: text}, as_json=True, title="")
    assert json.loads(capsys.readouterr().out) == {text: text}


def test_a_pipe_gets_whole_values(capsys: pytest.CaptureFixture[str]) -> None:
    record = {f"digest {number}": DIGEST * number for number in (1, 4)}
    print_record(record, as_json=False, title="a title " * 30)
    shown = capsys.readouterr().out
    assert all(value in line for value, line in zip(record.values(), shown.splitlines()[2:], strict=False))
    assert shown.splitlines()[0].strip() == ("a title " * 30).strip()
    assert "…" not in shown


def test_a_terminal_gets_whole_values_folded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "60")
    print_record({"digest": DIGEST}, as_json=False, title="")
    cells = [line.split("│")[2].strip() for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert "".join(cells) == DIGEST
    assert len(cells) > 1


LINES = st.text(st.sampled_from("ab \n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029é"))


@given(LINES)
def test_a_text_is_one_line_for_every_reader(text: str) -> None:
    line = one_line(text)
    assert len(f"{line}\n".splitlines()) == 1
    assert line.split() == text.split()
    assert one_line(line) == line


@given(LINES)
def test_a_record_is_one_line_and_keeps_its_texts(text: str) -> None:
    line = json_line({"text": text})
    assert len(line.splitlines()) == 1
    assert json.loads(line) == {"text": text}

"""Reading the user's files: every format gives the same pairs, every mistake a message that names the line."""

import io
import sys
from pathlib import Path

import pytest

from data_owner_client.data.pairs import Pair, digest_pairs, read_pairs, read_parallel, split_validation
from protocol.errors import InvalidData

PAIRS = [Pair("Hello, “you”", 'Hallo "du"'), Pair("a\u2028b, c", "x; y")]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_every_format_gives_the_same_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl = write(
        tmp_path / "p.jsonl",
        '{"source": "Hello, “you”", "target": "Hallo \\"du\\""}\n\n{"source": "a\u2028b, c", "target": "x; y"}\n',
    )
    tsv = write(tmp_path / "p.tsv", 'Hello, “you”\tHallo "du"\na\u2028b, c\tx; y\n')
    headed = write(tmp_path / "h.tsv", 'id\tsource\ttarget\r\n1\tHello, “you”\tHallo "du"\r\n2\ta\u2028b, c\tx; y\r\n')
    table = write(tmp_path / "p.csv", 'target,source\n"Hallo ""du""","Hello, “you”"\nx; y,"a\u2028b, c"\n')
    sources = write(tmp_path / "s.txt", "Hello, “you”\na\u2028b, c\n")
    targets = write(tmp_path / "t.txt", 'Hallo "du"\nx; y\n')
    assert [read_pairs(path) for path in (jsonl, tsv, headed, table)] == [PAIRS] * 4
    assert read_parallel(sources, targets) == PAIRS
    assert read_pairs(sources, need_targets=False) == [Pair(pair.source) for pair in PAIRS]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(jsonl.read_bytes())))
    assert read_pairs("-") == PAIRS


def test_field_names(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", '{"en": "yes", "de": "ja"}')
    assert read_pairs(path, source_field="en", target_field="de") == [Pair("yes", "ja")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"source": "x", "target": "y"}\n{', ":2 is not JSON"),
        ("a.jsonl", "[1]", ":1 is not a JSON object"),
        ("a.jsonl", '{"source": "x"}', ":1 has no text in the field 'target'"),
        ("a.jsonl", '{"source": " ", "target": "y"}', ":1 has no text in the field 'source'"),
        ("a.jsonl", '{"source": 3, "target": "y"}', ":1 has no text in the field 'source'"),
        ("a.jsonl", "\n", "is empty"),
        ("a.tsv", "only one column\n", ":1 has 1 columns"),
        ("a.csv", "id,en,de\n1,yes,ja\n", ":1 has 3 columns"),
        ("a.csv", '"' + "x" * 140000, "is not well-formed"),
        ("a.jsonl", '{"source": "\\ud800", "target": "y"}', "half of a surrogate pair"),
        ("a.txt", "x\n", "has no targets"),
        ("a.dat", "x\n", "not clear from its name"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(InvalidData, match=message) as caught:
        read_pairs(write(tmp_path / name, text))
    assert caught.value.hint


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="cannot be read"):
        read_pairs(tmp_path / "missing.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"source": "\xe4"}')
    with pytest.raises(InvalidData, match="not UTF-8 at byte 12"):
        read_pairs(tmp_path / "latin.jsonl")
    with pytest.raises(InvalidData, match=r"2 lines and .* has 1"):
        read_parallel(write(tmp_path / "s", "a\nb\n"), write(tmp_path / "t", "a\n"))
    with pytest.raises(InvalidData, match="t:2 is empty"):
        read_parallel(write(tmp_path / "s", "a\nb\n"), write(tmp_path / "t", "a\n\n"))
    with pytest.raises(InvalidData, match=r"s\.txt:2 is empty"):
        read_pairs(write(tmp_path / "s.txt", "a\n\nb\n"), need_targets=False)


def test_validation_split_keeps_equal_sources_together_and_is_stable() -> None:
    pairs = [Pair(f"text {i % 50}", f"target {i}") for i in range(100)]
    train, held_out = split_validation(pairs, 0.1)
    assert len({pair.source for pair in held_out}) == 10
    assert not {pair.source for pair in train} & {pair.source for pair in held_out}
    assert sorted(map(str, train + held_out)) == sorted(map(str, pairs))
    assert split_validation(list(reversed(pairs)), 0.1)[1] == list(reversed(held_out))
    few, held_out = split_validation(pairs[:4] * 10, 0.5)
    assert len({pair.source for pair in few}) == len({pair.source for pair in held_out}) == 2
    with pytest.raises(InvalidData):
        split_validation(pairs[:1], 0.1)


def test_digest_depends_on_every_text_and_their_order() -> None:
    assert len({digest_pairs(p) for p in (PAIRS, PAIRS[::-1], PAIRS[:1], [Pair("ab", "c")], [Pair("a", "bc")])}) == 5

"""Reading the user's files: all containers and forms give the same pairs, and problems are reported by line at once."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import sys
import threading
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_owner_client.data.pair_files import write_pairs
from data_owner_client.data.pairs import Pair, digest_pairs
from data_owner_client.data.reading.reader import (
    read_hypotheses,
    read_pairs,
    read_parallel,
    spool_pairs,
    spool_parallel,
    spool_sources,
)
from data_owner_client.data.reading.settings import ReadingSettings
from data_owner_client.data.validation_split import split_validation
from protocol.errors import InvalidData, InvalidRequest

PAIRS = [Pair("Hello, “you”", 'Hallo "du"'), Pair("a\u2028b, c", "x; y")]
CONVERSATION = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
RECORD = '{"source": "a", "target": "b"}\n'


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def records(**names: str) -> list[dict[str, str]]:
    return [{names.get("source", "source"): p.source, names.get("target", "target"): p.target or ""} for p in PAIRS]


def table(delimiter: str, rows: list[list[str]]) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows(rows)
    return out.getvalue()


ROWS = [["id", "source", "target"], *([str(n), p.source, p.target or ""] for n, p in enumerate(PAIRS))]
LINES = "".join(json.dumps(record) + "\n" for record in records())
CONTAINERS: dict[str, str | bytes] = {
    "lines.jsonl": LINES,
    "blank-lines.jsonl": LINES.replace("\n", "\n\n"),
    "lines.ndjson": json.dumps(records()[0], ensure_ascii=False) + "\r\n" + json.dumps(records()[1]),
    "lines.json": LINES,
    "array.json": json.dumps(records()),
    "indented.json": json.dumps(records(), indent=2),
    "object-with-list.json": json.dumps({"version": 1, "data": records(), "sizes": [1, 2]}, indent=1),
    "several-documents.json": "".join(json.dumps(record, indent=1) for record in records()),
    "documents-with-lists.json": "".join(json.dumps({"tools": [{"a": 1}]} | one, indent=1) for one in records()),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "bom-inside.jsonl": LINES.replace("\n", "\n\ufeff"),
    "utf16.jsonl": LINES.encode("utf-16"),
    "utf16-be.csv": b"\xfe\xff" + table(",", ROWS).encode("utf-16-be"),
    "packed.jsonl.gz": gzip.compress(LINES.encode()),
    "packed-unsaid.json": gzip.compress(LINES.encode()),
    "no-name": LINES,
    "comma.csv": table(",", ROWS),
    "semicolon.csv": table(";", ROWS),
    "tab.csv": table("\t", ROWS),
    "excel.csv": "sep=;\r\n" + table(";", ROWS),
    "bom.csv": "\ufeff" + table(",", ROWS),
    "line-feeds.csv": table(",", ROWS).replace("\r\n", "\n"),
    "carriage-returns.csv": table(",", ROWS).replace("\r\n", "\r"),
    "spaces-before-quotes.csv": "source, target\n"
    + "".join(
        '"{}",  "{}"\n'.format(*(text.replace('"', '""') for text in (pair.source, pair.target or "")))
        for pair in PAIRS
    ),
    "spaces.csv": table(",", [[" id", " source ", "target "], *ROWS[1:]]),
    "literal.tsv": "".join("\t".join(row) + "\r\n" for row in ROWS),
    "unnamed-tabs": "".join("\t".join(row) + "\n" for row in ROWS),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_pairs(tmp_path: Path, name: str) -> None:
    assert read_pairs(write(tmp_path / name, CONTAINERS[name])) == PAIRS


@pytest.mark.parametrize("format_", ["jsonl", "json", "csv", "tsv"])
def test_a_stated_format_goes_before_the_name(tmp_path: Path, format_: str) -> None:
    contents: dict[str, str | bytes] = {
        "jsonl": LINES,
        "json": json.dumps(records()),
        "csv": table(",", ROWS),
        "tsv": CONTAINERS["literal.tsv"],
    }
    settings = ReadingSettings(format=format_)  # type: ignore[arg-type]
    assert list(spool_pairs(write(tmp_path / "pairs.txt", contents[format_]), settings)) == PAIRS


@pytest.mark.parametrize("text", ["{name} is here", "[1] See below", "{{name}}", "[laughs]", "{\\n}"])
@pytest.mark.parametrize("lines", [1, 2])
def test_texts_in_brackets_are_no_json(tmp_path: Path, text: str, lines: int) -> None:
    path = write(tmp_path / "sources", f"{text}\n" * lines)
    assert [pair.source for pair in spool_sources(path, ReadingSettings(), trim=True)] == [text] * lines


def test_standard_input_is_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (LINES, json.dumps(records()), CONTAINERS["literal.tsv"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(str(content).encode())))
        assert read_pairs("-") == PAIRS
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InvalidData, match="Standard input is closed"):
        read_pairs("-")


@pytest.mark.parametrize(
    ("record", "fields"),
    [
        ({"source": "a", "target": "b", "id": 7}, {}),
        ({"prompt": "a", "completion": "b", "source": "web"}, {}),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, {}),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]}, {}),  # noqa: E501
        ({"translation": {"de": "b", "en": "a"}}, {"source_field": "en", "target_field": "de"}),
        ({"translation": {"de": "b", "en": "a"}}, {"source_field": "translation.en", "target_field": "translation.de"}),
        ({"translation.en": "a", "translation.de": "b"}, {"source_field": "translation.en", "target_field": "translation.de"}),  # noqa: E501
        ({"en": "a", "du": "b"}, {"source_field": "en", "target_field": "du"}),
        ({"prompt": "a", "completion": "b", "source": "x", "target": "y"}, {"source_field": "prompt", "target_field": "completion"}),  # noqa: E501
    ],
)  # fmt: skip
def test_forms_are_recognised_by_their_keys(tmp_path: Path, record: dict[str, object], fields: dict[str, str]) -> None:
    for content in (json.dumps(record) + "\n", json.dumps([record])):
        assert read_pairs(write(tmp_path / "p.json", content), **fields) == [Pair("a", "b")]  # type: ignore[arg-type]


OTHER_FORMS = [
    {"source": "a", "target": "b"},
    {"messages": CONVERSATION},
    {"conversations": CONVERSATION},
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "output": "b"},
    {"translation": {"en": "a", "de": "b"}},
]


@pytest.mark.parametrize("first", OTHER_FORMS[:-1])
@pytest.mark.parametrize("second", OTHER_FORMS)
def test_a_record_of_another_form_is_named(tmp_path: Path, first: dict[str, object], second: dict[str, object]) -> None:
    path = write(tmp_path / "p.jsonl", json.dumps(first) + "\n" + json.dumps(second))
    if first == second:
        assert read_pairs(path) == [Pair("a", "b")] * 2
    else:
        with pytest.raises(InvalidData, match=":2 has no field"):
            read_pairs(path)
        assert read_pairs(path, skip_invalid=True) == [Pair("a", "b")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        # Files as a whole.
        ("a.txt", "x\n", "has no targets"),
        ("a.dat", "x\n", "not clear from its name or content"),
        ("a.jsonl", "\n", "is empty"),
        ("a.dat", "\n", "is empty"),
        ("a.json", "", "is empty"),
        ("a.csv", "", "is empty"),
        ("a.json", "[]", "is empty"),
        ("a.json", '[{"source": "a", "target": "b"},', ":1 is not well-formed JSON"),
        ("a.json", '[{"source": "a", "target": "b"}\n{', ":2 is not well-formed JSON"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.json", json.dumps({"train": [{}], "test": [{}]}), "several lists of objects, 'train' and 'test'"),
        ("a.csv", b"PK\x03\x04", "a ZIP archive or a workbook"),
        ("a.csv", LINES.encode("utf-16-le"), "has NUL bytes"),
        ("a.jsonl.gz", gzip.compress(LINES.encode() * 1000)[:-20], "cannot be unpacked"),
        ("a.jsonl", b"\xff\xfea", "no text of its encoding"),
        # Columns and fields.
        ("a.csv", "english,german\nyes,ja\n", ":1 has the columns 'english', 'german', and none is known"),
        ("a.csv", "yes,ja\nno,nein\n", ":1 has the columns 'yes', 'ja', and none is known"),
        ("a.tsv", "yes\tja\nno\tnein\n", "--no-header"),
        ("a.csv", "source,de\nyes,ja\n", ":1 has no column 'target'"),
        ("a.csv", "source,target,source\nyes,ja,si\n", "has the column 'source' twice"),
        ("a.jsonl", '{"en": "x", "du": "y"}', "has the fields 'en', 'du', and none is known"),
        ("a.jsonl", '{"source": "", "target": "", "prompt": "", "completion": ""}', "fields of several forms"),
        ("a.jsonl", '{"translation": {"en": "a", "de": "b"}}', "'en', 'de', and nothing says which is the source"),
        # Records.
        ("a.jsonl", RECORD + "{", ":2 has no JSON"),
        ("a.jsonl", RECORD + "[1]", ":2 has no JSON object"),
        ("a.json", f"[{RECORD}, 1]", "a.json:2 has no JSON object"),
        ("a.jsonl", RECORD + "[" * 100_000, ":2 has JSON that is nested too deeply"),
        ("a.jsonl", RECORD + '{"source": "x"}', ":2 has no field 'target'.* It has 'source'"),
        ("a.jsonl", '{"source": "x"}\n' + RECORD, ":1 has no field 'target'"),
        ("a.jsonl", '{"source": " ", "target": "y"}', ":1 has an empty source"),
        ("a.jsonl", '{"source": "x", "target": "\\u3000"}', ":1 has an empty target"),
        ("a.jsonl", '{"source": 3, "target": "y"}', ":1 has a number instead of a text in source"),
        ("a.jsonl", '{"source": "x", "target": null}', ":1 has null instead of a text in target"),
        ("a.jsonl", '{"source": "x", "target": ["y"]}', ":1 has a list instead of a text in target"),
        ("a.jsonl", '{"source": "x", "target": NaN}', ":1 has a number instead of a text in target"),
        ("a.jsonl", '{"source": ' + "1" * 5000 + ', "target": "y"}', ":1 has a number instead of a text"),
        ("a.jsonl", '{"source": "x", "source": "z", "target": "y"}', ":1 has a key twice"),
        ("a.jsonl", '{"source": "\\ud800", "target": "y"}', ":1 has half of a surrogate pair in source"),
        ("a.jsonl", b'{"source": "caf\xe9", "target": "y"}', ":1 has bytes that are not UTF-8"),
        ("a.json", b'[\n{"source": "caf\xe9", "target": "y"}]', ":2 has bytes that are not UTF-8"),
        ("a.csv", b"source,target\ncaf\xe9,y\n", ":2 has bytes that are not UTF-8"),
        ("a.tsv", "source\tnote\ttarget\na\tb\tc\na\tb\tx\tc\n", ":3 has another number of fields"),
        ("a.tsv", "source\ttarget\na\n", ":2 has another number of fields"),
        ("a.csv", 'source,target\n"a" x,b\n', ":2 has a quotation mark out of place"),
        ("a.csv", 'source,target\n"a,b\nc,d\n', ":2 has a quotation mark that is not closed"),
        ("a.csv", 'source,target\n"a,b\nc,d\n"e",f\n', ":2 has a quotation mark that is not closed"),
        ("a.csv", "source,target\n" + "x" * 140_000 + ",y\n", ":2 has a field of more than 131,072 characters"),
        ("a.csv", "source,target\na\rb,y\n", ":2 has a carriage return outside of quotation marks"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "has a conversation without an answer"),
        ("a.jsonl", '{"messages": "a"}', "no list of turns"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    with pytest.raises(InvalidData) as caught:
        read_pairs(write(tmp_path / name, text))
    assert caught.match(message)
    assert caught.value.hint
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_problems_are_collected_over_the_whole_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [RECORD] * 100
    for number in range(0, 60, 5):
        lines[number] = '{"source": "a", "target": ""}\n'
    lines[1] = lines[98] = "{\n"
    path = write(tmp_path / "p.jsonl", "".join(lines))
    with pytest.raises(InvalidData) as caught:
        read_pairs(path)
    assert caught.match("14 of 100 texts cannot be used: 12 with an empty target")
    assert "p.jsonl:1, 6, 11, 16, 21, 26, 31, 36, 41, 46, …" in str(caught.value)
    assert "2 with no JSON" in str(caught.value)
    assert "p.jsonl:2, 99)" in str(caught.value)
    assert "--skip-invalid" in caught.value.hint
    with caplog.at_level(logging.WARNING):
        pairs = read_pairs(path, skip_invalid=True)
    assert pairs == [Pair("a", "b")] * 86
    assert "Left out 14 of 100 texts: 12 with an empty target" in caplog.text
    assert [str(pair.origin).rpartition("/")[2] for pair in pairs[:3]] == ["p.jsonl:3", "p.jsonl:4", "p.jsonl:5"]
    with pytest.raises(InvalidData, match="No text can be used"):
        read_pairs(write(tmp_path / "q.jsonl", "{\n{\n"), skip_invalid=True)


def test_a_stray_quotation_mark_takes_no_other_line(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", 'source,target\n"a,b\nc,d\n"e\nf",g\n"h",i\n')
    assert read_pairs(path, skip_invalid=True) == [Pair("c", "d"), Pair("e\nf", "g"), Pair("h", "i")]
    stray = "source,target\n" + '"a,b\n' * 200
    with pytest.raises(InvalidData, match="out of place in more than 100 rows"):
        read_pairs(write(tmp_path / "q.csv", stray), skip_invalid=True)


def test_tables_without_a_header(tmp_path: Path) -> None:
    path = write(tmp_path / "p.tsv", "1\tyes\tja\n2\tno\tnein\n")
    assert read_pairs(path, header=False) == [Pair("1", "yes"), Pair("2", "no")]
    assert read_pairs(path, header=False, source_field="3", target_field="2") == [Pair("ja", "yes"), Pair("nein", "no")]
    with pytest.raises(InvalidData, match="no column '4'"):
        read_pairs(path, header=False, target_field="4")


def test_texts_keep_their_characters(tmp_path: Path) -> None:
    texts = [
        "a\u00a0",
        "\u3000b",
        "c\u2028d\u0085e",
        "f\tg",
        "h\ni",
        "\u200bj",
        "ﬁ é e\u0301 👩\u200d👩\u200d👧",
        "\ufeffk",
    ]
    pairs = [Pair(text, text[::-1]) for text in texts]
    lines = "".join(json.dumps({"source": f" {p.source}\n", "target": f"\t{p.target} "}) + "\n" for p in pairs)
    assert read_pairs(write(tmp_path / "p.jsonl", lines)) == pairs


def test_parallel_files(tmp_path: Path) -> None:
    sources = write(tmp_path / "s.txt", "Hello, “you”\r\na\u2028b, c\r\n")
    targets = write(tmp_path / "t.txt", 'Hallo "du"\nx; y')
    assert read_parallel(sources, targets) == list(spool_parallel(sources, targets)) == PAIRS
    with pytest.raises(InvalidData, match=r"2 lines and .* has 1"):
        read_parallel(sources, write(tmp_path / "t", "a\n"))
    with pytest.raises(InvalidData, match=r"t:2 has an empty target"):
        read_parallel(sources, write(tmp_path / "t", "a\n\n"))
    assert read_parallel(sources, write(tmp_path / "t", b"\xe9\nb\n"), skip_invalid=True) == [Pair("a\u2028b, c", "b")]
    with pytest.raises(InvalidData, match="Parallel files are text"):
        spool_parallel(sources, targets, ReadingSettings(format="jsonl"))


def test_sources_keep_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "s.en", b"\xef\xbb\xbfone\n\n three \ncaf\xe9\n")
    with pytest.raises(InvalidData, match=r"s\.en:4 has bytes that are not UTF-8"):
        spool_sources(path)
    skipping = ReadingSettings(skip_invalid=True)
    assert [pair.source for pair in spool_sources(path, skipping)] == ["one", "", "three", ""]
    assert [pair.source for pair in spool_sources(path, skipping, trim=False)] == ["one", "", " three ", ""]
    path = write(tmp_path / "s.jsonl", '{"source": "one"}\n{"source": ""}\n{}\n')
    assert [pair.source for pair in spool_sources(path, skipping)] == ["one", "", ""]
    path = write(tmp_path / "s.csv", "source\none\n\nthree\n")
    assert [pair.source for pair in spool_sources(path)] == ["one", "", "three"]


def test_hypotheses_may_be_empty(tmp_path: Path) -> None:
    assert read_hypotheses(write(tmp_path / "h", "a\n\nb")) == ["a", "", "b"]
    with pytest.raises(InvalidData, match="h:2 has bytes that are not UTF-8"):
        read_hypotheses(write(tmp_path / "h", b"a\n\xff\n"))


def test_unreadable_files(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(InvalidData, match="cannot be read"):
            read_pairs(path)


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="format is 'xml'"):
        ReadingSettings(format="xml")  # type: ignore[arg-type]


def test_pairs_have_texts() -> None:
    for source in ("\ud800", 3, None, b"a"):
        with pytest.raises(InvalidData, match="source") as caught:
            Pair(source, "b")  # type: ignore[arg-type]
        assert caught.value.hint
    with pytest.raises(InvalidData, match="half of a surrogate pair in the target"):
        Pair("a", "\udc80")


def test_spooled_pairs_are_a_sequence(tmp_path: Path) -> None:
    pairs = [Pair(f"ä{n}", f"ö{n}") for n in range(1500)]
    lines = "".join(json.dumps({"source": pair.source, "target": pair.target}) + "\n" for pair in pairs)
    spooled = spool_pairs(write(tmp_path / "p.jsonl", lines))
    assert list(spooled) == pairs
    assert len(spooled) == len(pairs)
    for part in (slice(3), slice(1000, 1200), slice(None, None, 7), slice(5, 2), slice(-3, None)):
        assert list(spooled[part]) == pairs[part]
    assert (spooled[0], spooled[-1]) == (pairs[0], pairs[-1])
    assert str(spooled[41].origin).endswith("p.jsonl:42")
    with pytest.raises(IndexError):
        spooled[1500]
    wrong: list[int] = []

    def read(offset: int) -> None:
        wrong.extend(n for n in range(offset, 1500, 4) if spooled[n] != pairs[n])

    threads = [threading.Thread(target=read, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def write_long_pairs(path: Path, count: int) -> None:
    text = "word " * 40
    texts = [(f"{text}{n}", text) for n in range(count)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table(dict(zip(("source", "target"), zip(*texts, strict=True), strict=True))), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"source": source, "target": target} for source, target in texts]))
    elif path.suffix == ".jsonl":
        path.write_text("".join(f'{{"source": "{source}", "target": "{target}"}}\n' for source, target in texts))
    else:
        delimiter = "," if path.suffix == ".csv" else "\t"
        path.write_text("".join(f"{s}{delimiter}{t}\n" for s, t in [("source", "target"), *texts]))


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.tsv", "p.parquet"])
def test_memory_does_not_grow_with_the_texts(tmp_path: Path, name: str) -> None:
    def peak(count: int) -> int:
        path = tmp_path / name
        write_long_pairs(path, count)
        tracemalloc.start()
        # All that a build does with the texts before it sends them.
        train, held_out = split_validation(spool_pairs(path), 0.5)
        assert len(train) + len(held_out) == count
        assert len(digest_pairs(train)) == 64
        write_pairs(tmp_path / "stored.jsonl", train)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    few, many = peak(1_000), peak(5_000)
    # Numbers for each pair, and not its 400 characters.
    assert many - few < 4_000 * 80

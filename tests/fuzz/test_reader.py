"""The reader against any bytes, and any texts in every container and form: what goes in comes out, or is refused."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_owner_client.data.pair_files import PairFile, read_stored_pairs, write_pairs
from data_owner_client.data.pairs import Pair, digest_pairs
from data_owner_client.data.reading.reader import (
    read_hypotheses,
    read_pairs,
    read_parallel,
    spool_parallel,
    spool_sources,
)
from data_owner_client.data.reading.settings import Format, ReadingSettings
from tests.forms import CONTAINERS, as_parquet
from tests.forms import FORMS as FORMS_OF_TOOLS
from tests.hostile import altered, damaged, refused
from tests.profiles import scaled

pytestmark = pytest.mark.unguarded("no server")

TRIMMED = " \t\r\n"
# Every character that UTF-8 has, the ones that mean something to a container more often.
CHARACTERS = st.characters(exclude_categories=["Cs"]) | st.sampled_from(
    "\"',;\t\n\r{}[]\\ |\0\ufeff\u2028\u0085\u00a0\u3000\x1c▁👩\u200d"
)
ANY_TEXT = st.text(CHARACTERS, min_size=1, max_size=12).map(lambda text: text.strip(TRIMMED)).filter(str.strip)
ANY_PAIRS = st.lists(st.builds(Pair, ANY_TEXT, ANY_TEXT), min_size=1, max_size=5)
# A line of a text file or of TSV: nothing that ends a line or a field, and no NUL, which is refused.
LINE = ANY_TEXT.map(lambda text: "".join(c for c in text if c not in "\t\r\n\0").strip(TRIMMED)).filter(str.strip)
LINES = st.lists(st.builds(Pair, LINE, LINE), min_size=1, max_size=5)
FORMS: dict[str, Callable[[Pair], dict[str, Any]]] = {
    "own": lambda pair: {"id": 1, "source": pair.source, "target": pair.target},
    "completion": lambda pair: {"prompt": pair.source, "completion": pair.target, "source": "web"},
    "messages": lambda pair: {
        "messages": [{"role": "user", "content": pair.source}, {"role": "assistant", "content": pair.target}]
    },
    "parts": lambda pair: {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": pair.source}]},
            {"role": "assistant", "content": pair.target},
        ]
    },
    "translation": lambda pair: {"translation": {"en": pair.source, "de": pair.target}},
    "named": lambda pair: {"en": pair.source, "de": pair.target},
}


def fields(form: str) -> dict[str, str]:
    return {"source_field": "en", "target_field": "de"} if form in ("translation", "named") else {}


def json_documents(records: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """File names and contents: the same records in each JSON container."""
    for ascii_only in (True, False):
        lines = [json.dumps(record, ensure_ascii=ascii_only) for record in records]
        yield "a.jsonl", "\n".join(lines)
        yield "a.json", "\r\n\r\n".join(lines) + "\n"
        yield "a.json", json.dumps(records, ensure_ascii=ascii_only)
        yield "a.json", json.dumps(records, ensure_ascii=ascii_only, indent=2)
        yield "a.json", json.dumps({"version": [1], "data": records, "n": 0}, ensure_ascii=ascii_only, indent=1)
        yield "a.json", "".join(json.dumps(record, ensure_ascii=ascii_only, indent=1) for record in records)


def encoded(text: str) -> Iterator[bytes]:
    """The same text in every encoding that is read, packed or not."""
    for data in (text.encode(), text.encode("utf-8-sig"), text.encode("utf-16"), text.encode("utf-32")):
        yield data
        yield gzip.compress(data, mtime=0)


@given(
    content=st.binary(max_size=80)
    | damaged(b'source,target\n"a",b\n')
    | damaged(b'{"source": "a", "target": "b"}\n{"source": "c", "target": "d"}\n')
    | damaged(b'[{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]')
    | damaged(gzip.compress(b"source\ttarget\na\tb\n", mtime=0))
    | damaged("source\ttarget\nä\tb\n".encode("utf-16"))
    | damaged(as_parquet([{"source": "a", "target": "b"}] * 3))
    | damaged(as_parquet(FORMS_OF_TOOLS["tools"][0])),
    suffix=st.sampled_from(["jsonl", "json", "csv", "tsv", "txt", "en", "gz", "parquet"]),
    format_=st.none() | st.sampled_from(get_args(Format)),
    header=st.booleans(),
    skip_invalid=st.booleans(),
)
@settings(max_examples=scaled(1500), database=None)
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    content: bytes,
    suffix: str,
    format_: Format | None,
    header: bool,
    skip_invalid: bool,
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    path.write_bytes(content)
    pairs = refused(lambda: read_pairs(path, format=format_, header=header, skip_invalid=skip_invalid))
    # A tool may answer nothing, and tool calls may stand alone.
    assert pairs is None or all(
        pair.origin and (pair.source.strip() or pair.conversation) and (pair.target.strip() or pair.reply)
        for pair in pairs
    )
    chosen = ReadingSettings(format=format_, header=header, skip_invalid=skip_invalid)
    refused(lambda: list(spool_sources(path, chosen)))
    refused(lambda: read_hypotheses(path))
    refused(lambda: read_parallel(path, path))


@given(pairs=ANY_PAIRS, form=st.sampled_from(list(FORMS)))
@settings(max_examples=scaled(200), database=None)
def test_json_of_all_forms_gives_the_texts_back(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[Pair], form: str
) -> None:
    folder = tmp_path_factory.getbasetemp()
    for name, text in json_documents([FORMS[form](pair) for pair in pairs]):
        path = folder / name
        path.write_bytes(text.encode())
        assert read_pairs(path, **fields(form)) == pairs  # type: ignore[arg-type]
        assert [pair.source for pair in spool_sources(path, ReadingSettings(**fields(form)))] == [  # type: ignore[arg-type]
            pair.source for pair in pairs
        ]


@given(pairs=ANY_PAIRS, data=st.data())
@settings(max_examples=scaled(100), database=None)
def test_encodings_give_the_texts_back(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[Pair], data: st.DataObject
) -> None:
    name, text = data.draw(st.sampled_from(list(json_documents([FORMS["own"](pair) for pair in pairs]))))
    for content in encoded(text):
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes(content)
        assert read_pairs(path) == pairs


@given(
    pairs=ANY_PAIRS,
    delimiter=st.sampled_from(",;\t"),
    line_end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
)
@settings(max_examples=scaled(300), database=None)
def test_csv_gives_the_texts_back(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[Pair], delimiter: str, line_end: str, quoting: Any
) -> None:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator=line_end, quoting=quoting)
    writer.writerows([["target", "id", "source"], *([pair.target, "", pair.source] for pair in pairs)])
    path = tmp_path_factory.getbasetemp() / "a.csv"
    for content in (out.getvalue().encode(), out.getvalue().encode("utf-16")):
        path.write_bytes(content)
        found = refused(lambda: read_pairs(path))
        # Python's writer leaves carriage returns without quotation marks if they end no line.
        assert found == pairs or (found is None and ("\0" in out.getvalue() or "\r" in out.getvalue()))


@given(pairs=LINES, line_end=st.sampled_from(["\n", "\r\n"]))
@settings(max_examples=scaled(200), database=None)
def test_lines_give_the_texts_back(tmp_path_factory: pytest.TempPathFactory, pairs: list[Pair], line_end: str) -> None:
    folder = tmp_path_factory.getbasetemp()
    table, sources, targets = folder / "a.tsv", folder / "a.en.txt", folder / "a.de.txt"
    rows = [("source", "target"), *((pair.source, pair.target or "") for pair in pairs)]
    table.write_bytes("".join("\t".join(row) + line_end for row in rows).encode())
    assert read_pairs(table) == pairs
    for path, texts in ((sources, [p.source for p in pairs]), (targets, [p.target or "" for p in pairs])):
        # A text may begin with a byte-order mark, which is only one at the beginning of a file.
        path.write_bytes("".join(text + line_end for text in texts).encode("utf-8-sig"))
        assert [pair.source for pair in spool_sources(path)] == read_hypotheses(path) == texts
    assert read_parallel(sources, targets) == list(spool_parallel(sources, targets)) == pairs


@given(pairs=st.lists(st.builds(Pair, st.text(), st.none() | st.text()), max_size=5))
@settings(max_examples=scaled(200), database=None)
def test_stored_pairs_come_back_unchanged(tmp_path_factory: pytest.TempPathFactory, pairs: list[Pair]) -> None:
    path: Path = tmp_path_factory.getbasetemp() / "pairs.jsonl"
    write_pairs(path, pairs)
    stored = read_stored_pairs(path, digest_pairs(pairs))
    assert stored is not None
    assert list(stored) == list(PairFile.spool(pairs)) == pairs
    assert read_stored_pairs(path, digest_pairs([*pairs, Pair("a")])) is None


@given(data=st.data(), form=st.sampled_from(list(FORMS_OF_TOOLS)), container=st.sampled_from(["jsonl", "json", "csv"]))
@settings(max_examples=scaled(600), database=None)
def test_any_records_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, form: str, container: str
) -> None:
    """Records of all forms with something else in some place: whatever is read can be stored."""
    records, _, labels = FORMS_OF_TOOLS[form]
    changed = [records[0], data.draw(altered(records[0]))]
    if container == "csv":
        changed = [record for record in changed if isinstance(record, dict) and list(record) == list(records[0])]
    path = tmp_path_factory.getbasetemp() / f"altered.{container}"
    path.write_bytes(CONTAINERS[container](changed))
    for need_targets in (True, False):
        found = refused(lambda: read_pairs(path, labels=labels, skip_invalid=True, need_targets=need_targets))  # noqa: B023
        if found is not None:
            stored = path.with_suffix(".stored")
            write_pairs(stored, found)
            assert read_stored_pairs(stored, digest_pairs(found)) is not None

"""Forms of records: each gives the same pairs in every container, and what cannot be learned is named."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_owner_client.data.pair_files import PairFile, read_stored_pairs, write_pairs
from data_owner_client.data.pairs import Pair, digest_pairs
from data_owner_client.data.reading.forms import recognise
from data_owner_client.data.reading.problems import InvalidText, Origin, Problems
from data_owner_client.data.reading.reader import read_pairs, spool_pairs, spool_sources
from data_owner_client.data.reading.records import scan
from data_owner_client.data.reading.settings import ReadingSettings
from protocol.errors import InvalidData, InvalidRequest
from tests.forms import CONTAINERS, FORMS, as_parquet, assistant, talk, user


def without_group(pair: Pair) -> Pair:
    return Pair(pair.source, pair.target, conversation=pair.conversation, reply=pair.reply, references=pair.references)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzipped"])
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_every_container(tmp_path: Path, form: str, container: str, packed: bool) -> None:
    records, expected, labels = FORMS[form]
    data = CONTAINERS[container](records)
    path = tmp_path / f"file.{container}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(data) if packed else data)
    found = read_pairs(path, labels=labels)
    assert list(map(without_group, found)) == expected
    assert {pair.origin and pair.origin.name for pair in found} == {str(path)}
    # What is spooled and stored is the same.
    spooled = spool_pairs(path, ReadingSettings(labels=labels))
    assert list(spooled) == found
    write_pairs(tmp_path / "stored", found)
    stored = read_stored_pairs(tmp_path / "stored", digest_pairs(spooled))
    assert stored is not None
    assert list(stored) == found
    # Without targets, each record asks its last question.
    if "article" not in form:
        sources = spool_sources(path, ReadingSettings(labels=labels))
        last = {pair.origin and pair.origin.number: pair.question for pair in found}
        assert [pair.question for pair in sources] == list(last.values())
        assert {pair.target for pair in sources} == {None}


def test_pairs_of_one_record_have_one_group_and_others_have_none(tmp_path: Path) -> None:
    one = [user("a"), assistant("b"), user("c"), assistant("d")]
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        CONTAINERS["jsonl"]([{"messages": one}, {"messages": one[:2]}, {"messages": [user("x"), *one[1:]]}])
    )
    groups = [pair.group for pair in read_pairs(path)]
    assert groups[0] == groups[1] != groups[3] == groups[4]
    assert groups[2] == ""
    path.write_bytes(CONTAINERS["jsonl"]([{"question": q, "context": c, "answer": "b"} for q, c in ("ax", "bx", "cy")]))
    groups = [pair.group for pair in read_pairs(path)]
    assert groups[0] == groups[1] != groups[2]


def test_plain_pairs_keep_their_bytes_and_digest(tmp_path: Path) -> None:
    """As the versions before had them, so that memories and adapters on disk stay readable."""
    pairs = [Pair("Hello", "Hallo"), Pair("a\u2028", None)]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert (tmp_path / "pairs.jsonl").read_text().split("\n")[0] == '{"source": "Hello", "target": "Hallo"}'
    assert digest_pairs(pairs) == "936cce5ed280e2eb3737e49295bc42f48f3dfa1de180eed1f2b7e346cbdbfbeb"


@pytest.mark.parametrize("further", ["conversation", "reply", "references", "group"])
def test_digests_cover_all_fields(further: str) -> None:
    values: dict[str, Any] = {
        "conversation": talk(user("a")),
        "reply": assistant("b"),
        "references": ("c",),
        "group": "g",
    }
    pair = Pair("a", "b", **{further: values[further]})
    assert digest_pairs([pair]) != digest_pairs([Pair("a", "b")])
    assert list(PairFile.spool([pair])) == [pair]


def test_label_names_of_the_datasets_library(tmp_path: Path) -> None:
    feature = {"info": {"features": {"label": {"names": ["bad", "good"], "_type": "ClassLabel"}}}}
    table = pa.table({"text": ["a"], "label": [1]}).replace_schema_metadata({"huggingface": json.dumps(feature)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_pairs(tmp_path / "a.parquet") == [Pair("a", "good")]
    assert read_pairs(tmp_path / "a.parquet", labels=["x", "y"]) == [Pair("a", "y")]


def test_labels_of_named_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"sentence": "a", "y": 1}\n')
    assert read_pairs(path, source_field="sentence", target_field="y", labels=["n", "p"]) == [Pair("a", "p")]
    with pytest.raises(InvalidData, match="a number instead of a text in target"):
        read_pairs(path, source_field="sentence", target_field="y")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        # Turns.
        ({"messages": "a"}, "no list of turns"),
        ({"messages": [user("a")]}, "without an answer of the assistant"),
        ({"messages": [assistant("a")]}, "without an answer of the assistant"),
        ({"messages": [assistant("a"), user("b"), assistant("c")]}, "follows no turn of the user or a tool"),
        ({"messages": [user("a"), assistant("b"), assistant("c")]}, "follows no turn of the user or a tool"),
        ({"messages": [user("a"), {"role": "judge", "content": "b"}]}, "a turn of the unknown role"),
        ({"messages": [user("a"), {"role": ["assistant"], "content": "b"}]}, "a turn of the unknown role"),
        ({"messages": [user("a"), assistant(" ")]}, "an empty target"),
        ({"messages": [user(" "), assistant("b")]}, "an empty source"),
        ({"messages": [user("a"), {"role": "assistant", "content": None}]}, "null instead of a text in target"),
        ({"messages": [{"role": "system", "content": 5}, user("a"), assistant("b")]}, "instead of a text in system"),
        ({"messages": [user("a"), assistant("b", reasoning_content="x")]}, "a turn with thoughts"),
        ({"messages": [user("a"), assistant("b", weight=0.5)]}, "a weight that is neither 0 nor 1"),
        ({"messages": [user("a"), assistant("b", weight=0)]}, "excludes all answers from learning"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, assistant("b")]}, "that are no texts"),
        ({"messages": [user("a"), assistant("\ud800")]}, "half of a surrogate pair in target"),
        ({"messages": [user("a"), assistant("b")], "tools": "clock"}, "tools that are no list of objects"),
        ({"messages": [user("a"), assistant("b")], "chat_template_kwargs": {"a": 1}}, "template arguments of its own"),
        ({"messages": [user("a"), assistant("", tool_calls=[{"name": "\ud800"}])]}, "half of a surrogate pair in"),
        ({"messages": [user("a"), {"from": "function_call", "value": "clock()"}]}, "without its name"),
        ({"messages": [user("a"), assistant("", tool_calls=[{"function": {}}])]}, "without its name"),
        (
            {"messages": [user("a"), assistant("", tool_calls=[{"name": "f", "arguments": "{x"}])]},
            "whose arguments are no JSON object",
        ),
        # Tables of pandas.
        ({"messages": "[{'role': 'user', 'content': 'a'}]"}, "a list or an object as Python writes it"),
        ({"question": "a", "answers": "{'text': array(['b'], dtype=object)}"}, "as Python writes it"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "a history that has other things than pairs"),
        # Questions.
        ({"question": "a", "answers": []}, "a question without an answer"),
        ({"question": "a", "answers": {"text": [], "answer_start": []}}, "a question without an answer"),
        ({"question": "a", "answer": ""}, "a question without an answer"),
        ({"question": "a", "answers": ["b"], "is_impossible": True}, "a question without an answer"),
        ({"question": "a", "answer": 3}, "a number instead of a text in target"),
        ({"question": "a", "answer": {"value": "b"}}, "no field 'text'"),
        ({"paragraphs": [{"context": "x", "qas": "y"}]}, "qas that are no list of objects"),
        # Labels.
        ({"text": "a", "label": 1}, "a number in place of a label's name"),
        ({"text": "a", "label": "1"}, "a number in place of a label's name"),
        ({"text": "a", "label": True}, "a number in place of a label's name"),
        ({"text": "a", "label": None}, "null instead of a text in target"),
        # Files that cannot be learned.
        ({"text": "a"}, "nothing that says which part of it is to be learned"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "These are preferences"),
        ({"messages": [user("a"), assistant("b")], "conversations": []}, "fields of several forms"),
        ({"question": "a", "answer": "b", "answers": ["c"]}, "fields of several forms"),
        ({"article": "a", "summary": "b", "highlights": "c"}, "fields of several forms"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_named(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(InvalidData, match=message) as caught:
        read_pairs(path)
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("label", [2, "2", "best", -1, 0.5])
def test_labels_are_those_that_are_named(tmp_path: Path, label: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a", "label": label}))
    with pytest.raises(InvalidData, match=r"none of --labels|a number instead of a text"):
        read_pairs(path, labels=["bad", "good"])


def test_labels_as_pandas_writes_them_beside_empty_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,1.0\nb,0.0\n")
    assert [pair.target for pair in read_pairs(path, labels=("bad", "good"))] == ["good", "bad"]
    with pytest.raises(InvalidRequest, match="labels has 'good' twice"):
        read_pairs(path, labels=("good", "good"))


@pytest.mark.parametrize("container", ["jsonl", "json", "csv", "parquet"])
def test_answers_with_fields_may_be_objects(tmp_path: Path, container: str) -> None:
    answer = {"name": "Tür", "levels": [1, 2.5], "more": {"on": True}}
    path = tmp_path / f"a.{container}"
    for form in ({"source": "a"}, {"input": "a"}, {"instruction": "a"}):
        target = "target" if "source" in form else "output"
        for value in (answer, [answer, answer]):
            path.write_bytes(CONTAINERS[container]([{**form, target: value}]))
            (pair,) = read_pairs(path)
            assert json.loads(pair.target or "") == value
    repeated = tmp_path / "b.jsonl"
    repeated.write_text('{"input": "a", "output": {"x": [{"b": 1, "b": 2}]}}')
    with pytest.raises(InvalidData, match="a key twice"):
        read_pairs(repeated)


def test_roles_may_begin_with_a_capital(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "User", "content": "a"}, {"role": "Assistant", "content": "b"}]}))
    assert [(pair.source, pair.target) for pair in read_pairs(path)] == [("a", "b")]


def test_a_table_says_in_words_that_a_question_has_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("question,answers,is_impossible\na,b,False\n")
    assert [pair.target for pair in read_pairs(path)] == ["b"]


def test_problems_list_the_first_lines_in_their_order() -> None:
    problems = Problems()
    for number in (9, 5, 5, *range(30, 10, -1)):
        problems.add(Origin("a", number), InvalidText("a spot", hint=""))
    (kind,) = problems.by_kind()
    assert (kind.count, kind.lines, kind.more) == (23, [5, 9, *range(11, 19)], True)


def test_an_unanswered_question_is_a_problem_of_its_own(tmp_path: Path) -> None:
    qas = [
        {"question": "a", "answers": [{"text": "b", "answer_start": 0}], "is_impossible": False},
        {"question": "c", "answers": [], "is_impossible": True},
    ]
    path = tmp_path / "squad.json"
    path.write_text(
        json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": "x", "qas": qas}]}]})
    )
    with pytest.raises(InvalidData, match=r"squad\.json:1 has a question without an answer"):
        read_pairs(path)
    assert [pair.source for pair in read_pairs(path, skip_invalid=True)] == ["x\n\na"]
    assert [pair.source for pair in spool_sources(path)] == ["x\n\na", "x\n\nc"]


def test_texts_alone_are_sources(tmp_path: Path) -> None:
    for record in ({"text": "a"}, {"question": "a"}, {"instruction": "a", "input": ""}, {"messages": [user("a")]}):
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps(record))
        assert [pair.source for pair in spool_sources(path)] == ["a"]


def test_a_record_of_another_form_is_a_problem_of_that_record(tmp_path: Path) -> None:
    records = [records[0] for records, _, labels in FORMS.values() if not labels]
    for first in records:
        form = recognise(first, ReadingSettings())
        assert form is not None
        others = [record for record in records if not set(form.keys) <= set(record)]
        path = tmp_path / "a.jsonl"
        path.write_bytes(CONTAINERS["jsonl"]([first, *others]))
        alone = tmp_path / "b.jsonl"
        alone.write_bytes(CONTAINERS["jsonl"]([first]))
        found = read_pairs(path, skip_invalid=True)
        assert {pair.origin and pair.origin.number for pair in found} == {1}
        assert found == read_pairs(alone)


def test_damaged_parquet(tmp_path: Path) -> None:
    data = as_parquet([{"source": "a", "target": "b"}] * 20)
    for name, content in {
        "cut.parquet": data[: len(data) // 2],
        "named.parquet": b"source,target\na,b\n",
        "empty.parquet": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InvalidData, match="is no Parquet file, or damaged") as caught:
            read_pairs(tmp_path / name)
        assert caught.value.hint
    table = pa.table({"source": pa.array([b"caf\xe9"]).cast(pa.binary()), "target": ["b"]})
    pq.write_table(table, tmp_path / "bytes.parquet")
    with pytest.raises(InvalidData, match="bytes instead of a text in source"):
        read_pairs(tmp_path / "bytes.parquet")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(as_parquet([{"source": "a", "target": "b"}]))
    with pytest.raises(InvalidData, match="pyarrow is not installed") as caught:
        read_pairs(tmp_path / "a.parquet")
    assert "pip install -e '.[client,parquet]'" in caught.value.hint


def test_parquet_is_read_in_batches(tmp_path: Path) -> None:
    """Arrow's own memory, which Python does not see, grows with a batch and not with the file of one row group."""
    pool = pa.system_memory_pool()
    texts = [f"{row} " + "word " * 200 for row in range(12_000)]
    pq.write_table(pa.table({"source": texts, "target": texts}), path := tmp_path / "a.parquet", compression="none")
    default = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        before = pool.bytes_allocated()
        highest = max(
            pool.bytes_allocated() - before for _ in scan(path, ReadingSettings(), Problems(), need_targets=True)
        )
    finally:
        pa.set_memory_pool(default)
    assert 0 < highest < path.stat().st_size / 4


def test_workbooks_are_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"PK\x03\x04" + b"\0" * 50)
    with pytest.raises(InvalidData, match="workbook") as caught:
        read_pairs(tmp_path / "a.xlsx")
    assert "save a workbook as CSV" in caught.value.hint

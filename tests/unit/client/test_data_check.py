"""`pema-client data check` without a server: what a file is, and what is wrong with it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_owner_client.data.checking.files import check_files, read_parts
from data_owner_client.data.checking.report import DataReport, Lengths
from data_owner_client.data.reading.problems import Problems
from data_owner_client.data.reading.settings import ReadingSettings
from tests.command_line import client, client_json
from tests.forms import CONTAINERS, FORMS, assistant, user
from tests.profiles import scaled


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_bytes(CONTAINERS["jsonl"](records))
    return path


def pairs(*texts: str) -> list[dict[str, Any]]:
    return [{"source": text[0], "target": text[1]} for text in texts]


def report_on(*paths: Path, **reading: Any) -> DataReport:
    problems = Problems()
    return check_files(read_parts(paths, ReadingSettings(**reading), problems), problems)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_recognised(tmp_path: Path, form: str) -> None:
    records, expected, labels = FORMS[form]
    report = report_on(write(tmp_path / "a.jsonl", records), labels=labels)
    (part,) = report.parts
    assert (part.records, part.pairs) == (len(records), len(expected))
    assert part.container == "JSON lines"
    assert [example.prompt for example in report.examples] == [pair.source for pair in expected[:3]]
    assert report.usable


def test_the_line_about_a_file_has_its_counts(tmp_path: Path) -> None:
    first = [user("a"), assistant("b"), user("c"), assistant("d", weight=0), user("e"), assistant("f")]
    done = client(None, "data check", write(tmp_path / "a.jsonl", [{"messages": first}, {"messages": first[:2]}]))
    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == (
        f"{tmp_path}/a.jsonl: OpenAI messages in JSON lines: 2 conversations, 3 answers (1 with weight 0 left out), "
        "1 duplicate, longest 1 + 1 characters."
    )
    assert "show earlier answers of their conversation: 1" in done.stdout
    assert done.stdout.endswith("Nothing must be mended.\n")


def test_duplicates_contradictions_and_overlaps(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", pairs("ab", "cd", "ab", "ax", "ef", "ax", "ab"))
    dev = write(tmp_path / "dev.jsonl", pairs("ay", "gh"))
    report = report_on(train, dev)
    part = report.parts[0]
    # In order: 3 repeats 1, 4 contradicts 1, 6 repeats 4, 7 repeats 1.
    assert (part.duplicates.count, part.duplicates.lines) == (3, [3, 6, 7])
    assert (part.contradictions.count, part.contradictions.lines) == (1, [4])
    (overlap,) = report.overlaps
    assert (overlap.first, overlap.second, overlap.count, overlap.lines) == (str(dev), str(train), 1, [1])
    # They may be meant so.
    assert report.usable


@given(
    rows=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz")), min_size=1, max_size=20),
    others=st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("xyz")), min_size=1, max_size=5),
)
@settings(max_examples=scaled(100), database=None)
def test_counts_of_repeated_pairs_are_right(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], others: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    files = [write(folder / f"{n}.jsonl", pairs(*map("".join, part))) for n, part in enumerate((rows, others))]
    report = report_on(*files)
    part = report.parts[0]
    assert part.duplicates.count == sum(count - 1 for count in Counter(rows).values())
    # A pair that is no duplicate contradicts, unless it is the first with its source.
    assert part.contradictions.count == len(set(rows)) - len({source for source, _ in rows})
    smaller, larger = sorted((rows, others), key=len)
    common = sum(source in {source for source, _ in larger} for source, _ in smaller)
    assert sum(overlap.count for overlap in report.overlaps) == common


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60))
def test_lengths_are_order_statistics(lengths: list[int]) -> None:
    found = Lengths.of(lengths)
    assert found is not None
    assert found.longest == max(lengths)
    assert sum(length <= found.median for length in lengths) >= len(lengths) / 2
    assert sum(length < found.median for length in lengths) <= len(lengths) / 2
    assert sum(length <= found.most for length in lengths) >= 0.95 * len(lengths)
    assert {found.median, found.most} <= set(lengths)


def test_labels_are_counted(tmp_path: Path) -> None:
    records = [{"text": str(n), "label": "good" if n % 2 else "bad"} for n in range(20)] + [
        {"text": "x", "label": "odd"}
    ]
    path = write(tmp_path / "a.jsonl", records)
    labels = report_on(path).parts[0].labels
    assert labels is not None
    assert (labels.labels, labels.largest, labels.single) == (3, {"bad": 10, "good": 10, "odd": 1}, ["odd"])
    assert "has labels that occur once: odd." in client(None, "data check", path).stdout
    # Of a task of this kind, also in other forms.
    own = write(tmp_path / "b.jsonl", [{"source": each["text"], "target": each["label"]} for each in records])
    assert report_on(own).parts[0].labels is None
    (tmp_path / "t.toml").write_text('name = "t"\nkind = "classify"\n')
    found = client_json(None, "data check", own, "--task", tmp_path / "t.toml")
    assert found["parts"][0]["labels"]["labels"] == 3


def test_problems_decide_the_exit_status(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad = ['{"source": "a", "target": ""}\n', "{\n", '{"source": "a", "target": ""}\n']
    path.write_text("".join([*bad, json.dumps({"source": "a", "target": "b"}) + "\n"]))
    done = client(None, "data check", path)
    assert done.returncode == 1
    for words in (
        "an empty target",
        f"{path}:1, 3",
        "no JSON",
        f"{path}:2",
        "Every pair needs two texts.",
        "Mend this",
    ):
        assert words in done.stdout
    record = client(None, "data check", path, "--json")
    assert record.returncode == 1
    assert [(each["count"], each["lines"]) for each in json.loads(record.stdout)["problems"]] == [(2, [1, 3]), (1, [2])]
    skipped = client(None, "data check", path, "--skip-invalid")
    assert (skipped.returncode, skipped.stdout.splitlines()[-1]) == (0, "These texts are left out.")
    path.write_text("".join(bad))
    assert client(None, "data check", path, "--skip-invalid").returncode == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "These are preferences"),
        ('{"en": "a", "de": "b"}', "none is known as the source"),
    ],
)
def test_files_that_are_none_are_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    done = client(None, "data check", tmp_path / "a.jsonl")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("task", "records", "message"),
    [
        ('kind = "classify"\nlabels = ["a", "b"]', [("x", "c")], "a label that the task does not have"),
        ('kind = "classify"', [("x", "a\nb"), ("y", "c")], "contains the stop"),
        ('kind = "extract"', [("x", "y")], "neither JSON nor slots"),
        ("", [("x", "y\nz")], "contains the stop"),
        ('stop = "##"', [("x", "y\nz")], ""),
        ('kind = "chat"', [("x", "y\nz")], ""),
    ],
)
def test_a_task_is_checked_without_a_server(
    tmp_path: Path, task: str, records: list[tuple[str, str]], message: str
) -> None:
    path = write(tmp_path / "a.jsonl", [{"source": source, "target": target} for source, target in records])
    (tmp_path / "t.toml").write_text(f'name = "t"\n{task}\n')
    done = client(None, "data check", path, "--task", tmp_path / "t.toml", "--json")
    assert done.returncode == bool(message), done.stderr
    assert [message in problem["kind"] for problem in json.loads(done.stdout)["problems"]] == [True] * bool(message)


def test_labels_of_the_task_that_no_pair_has_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "x", "label": "a"}])
    (tmp_path / "t.toml").write_text('name = "t"\nkind = "classify"\nlabels = ["a", "b", "c"]\n')
    done = client(None, "data check", path, "--task", tmp_path / "t.toml")
    assert done.returncode == 0
    assert "has no pair with these labels of the task: b, c." in done.stdout


def test_conversations_are_checked_against_a_task_as_they_will_be_learned(tmp_path: Path) -> None:
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    path = write(tmp_path / "a.jsonl", [{"messages": turns}])
    (tmp_path / "t.toml").write_text('name = "t"\n')
    arguments = [path, "--task", tmp_path / "t.toml", "--json"]
    assert client(None, "data check", *arguments).returncode == 0
    (problem,) = json.loads(client(None, "data check", *arguments, "--share-targets").stdout)["problems"]
    assert problem["kind"].startswith("earlier turns of its conversation")


def test_usage_names_the_whole_command() -> None:
    for arguments in ([], ["a.jsonl", "--labels"]):
        done = client(None, "data check", *arguments)
        assert done.returncode == 2
        assert "See pema-client data check --help." in done.stderr

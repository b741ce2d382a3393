"""Files of the field on the command line: the same reader with the same options in every verb that takes a file."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_owner_client.data.pairs import Pair
from data_owner_client.memory.store import ExternalMemory
from harness.tiny_models import TinyModels
from tests.command_line import client, client_json
from tests.support import make_service, serve

PAIRS = [(f"the {n} thin", f"die {n} Tür") for n in range(6)]
SHORT = ["--max-new-tokens", 4]


@pytest.fixture(scope="module")
def url(tiny_models: TinyModels) -> Iterator[str]:
    with serve(make_service(tiny_models["llama"], max_sequence_tokens=512)) as url:
        yield url


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "task.toml"
    path.write_bytes(b'\xef\xbb\xbfname = "tiny"\nsource_label = "In"\ntarget_label = "Out"\n')
    return path


@pytest.fixture
def build(url: str, task: Path, tmp_path: Path) -> Any:
    """Build a memory with these arguments; return the command and the memory's pairs."""

    def run(*arguments: Any, stdin: str = "") -> tuple[Any, list[Pair]]:
        folder = tmp_path / "memory"
        done = client(url, "build-memory", "--task", task, "--memory", folder, *arguments, stdin=stdin)
        return done, list(ExternalMemory(folder / "train").pairs()) if done.returncode == 0 else []

    return run


def lines(source: str = "source", target: str = "target") -> str:
    return "".join(json.dumps({source: s, target: t}) + "\n" for s, t in PAIRS)


def as_pairs(count: int = 6) -> list[Pair]:
    return [Pair(*pair) for pair in PAIRS[:count]]


def test_json_lines_in_files_named_json(build: Any, tmp_path: Path) -> None:
    """The data of the reference implementation: fields `en` and `du`, all files named `.json`."""
    train, dev = tmp_path / "train.json", tmp_path / "dev.json"
    train.write_text(lines("en", "du"))
    dev.write_text(lines("en", "du"))
    fields = ["--source-field", "en", "--target-field", "du"]
    for format_ in ([], ["--format", "jsonl"]):
        done, pairs = build("--input", train, "--validation", dev, *fields, *format_)
        assert done.returncode == 0, done.stderr
        assert pairs == as_pairs()
    done, _ = build("--input", train, "--validation", dev)
    assert done.returncode == 1
    assert "has the fields 'en', 'du', and none is known as the source" in done.stderr


def test_a_stated_format_holds_for_all_files(url: str, build: Any, tmp_path: Path) -> None:
    train, dev, test = (tmp_path / name for name in ("train.de", "dev.txt", "test.csv"))
    for path in (train, dev, test):
        path.write_text(lines())
    done, pairs = build("--input", train, "--validation", dev, "--format", "jsonl")
    assert (done.returncode, pairs) == (0, as_pairs())
    hypotheses = tmp_path / "hypotheses"
    hypotheses.write_text("".join(f"{target}\n" for _, target in PAIRS))
    scores = client_json(None, "evaluate", "--input", test, "--format", "jsonl", "--hypotheses", hypotheses)
    assert scores["scores"]["chrf"] == pytest.approx(100)


def test_a_column_never_becomes_another(build: Any, tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    rows = ["source\tnote\ttarget", *(f"{s}\tn\t{t}" for s, t in PAIRS), "a\tb\tc\td"]
    path.write_text("".join(row + "\n" for row in rows))
    done, _ = build("--input", path)
    assert done.returncode == 1
    assert "pairs.tsv:8 has another number of fields than the first line" in done.stderr
    done, pairs = build("--input", path, "--skip-invalid", "--validation", path)
    assert done.returncode == 0, done.stderr
    assert pairs == as_pairs()
    assert done.stderr.count("Left out 1 of 7 texts: 1 with another number of fields") == 2


def test_a_header_never_becomes_a_pair(build: Any, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("".join(f"{s},{t}\n" for s, t in [("english", "german"), *PAIRS]))
    done, _ = build("--input", path)
    assert done.returncode == 1
    assert "has the columns 'english', 'german'" in done.stderr
    assert "--no-header" in done.stderr
    named = ["--source-field", "english", "--target-field", "german"]
    assert build("--input", path, "--validation", path, *named)[1] == as_pairs()
    path.write_text("".join(f"{s},{t}\n" for s, t in PAIRS))
    assert build("--input", path, "--validation", path, "--no-header", "--overwrite")[1] == as_pairs()


@pytest.mark.parametrize(
    ("record", "options"),
    [
        (lambda s, t: {"messages": [{"role": "user", "content": s}, {"role": "assistant", "content": t}]}, []),
        (lambda s, t: {"prompt": s, "completion": t}, []),
        (lambda s, t: {"translation": {"en": s, "de": t}}, ["--source-field", "en", "--target-field", "de"]),
        (
            lambda s, t: {"translation": {"en": s, "de": t}},
            ["--source-field", "translation.en", "--target-field", "translation.de"],
        ),
    ],
)
def test_forms_of_other_tools(build: Any, tmp_path: Path, record: Any, options: list[str]) -> None:
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(record(*pair)) + "\n" for pair in PAIRS).encode()))
    done, pairs = build("--input", path, "--validation", path, *options)
    assert done.returncode == 0, done.stderr
    assert pairs == as_pairs()


def test_problems_are_told_at_once(build: Any, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    bad = ['{"source": "a", "target": ""}\n', "{\n", '{"source": "a", "target": ""}\n']
    path.write_bytes(lines().encode() + "".join(bad).encode() + b'{"source": "caf\xe9"}\n')
    done, _ = build("--input", path)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "4 of 10 texts cannot be used: 2 with an empty target" in line
    assert "pairs.jsonl:7, 9" in line
    assert "1 with bytes that are not UTF-8" in line
    assert line.endswith("Correct them, or say --skip-invalid to go on without.")
    # What only the tokenizer finds is told before anything is sent, too.
    path.write_text(lines() + '{"source": "a", "target": "b\\nc"}\n' + json.dumps({"source": "x" * 900, "target": "y"}))
    done, _ = build("--input", path, "--validation", path)
    assert done.returncode == 1
    assert "4 of 16 texts cannot be used" in done.stderr
    assert "pairs.jsonl:7" in done.stderr
    done, pairs = build("--input", path, "--validation", path, "--skip-invalid")
    assert (done.returncode, pairs) == (0, as_pairs()), done.stderr
    assert "Left out 4 of 16 texts" in done.stderr


def test_empty_lines_are_answered_by_empty_lines(url: str, task: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_bytes("\ufeffthe thin\r\n\r\n  \r\ndie Tür\r\n".encode())
    done = client(url, "translate", "--task", task, "--input", source, *SHORT)
    assert done.returncode == 0, done.stderr
    answers = done.stdout.split("\n")
    assert [bool(answer) for answer in answers] == [True, False, False, True, False]
    assert client(url, "translate", "--task", task, *SHORT, stdin=source.read_text("utf-8-sig")).stdout == done.stdout
    assert client(url, "translate", "--task", task, "--input", source, "--output", output, *SHORT).returncode == 0
    assert output.read_text() == done.stdout
    record = client_json(url, "translate", "--task", task, "--input", source, *SHORT)
    assert [bool(text["text"]) for text in record["texts"]] == [True, False, False, True]
    continued = client(url, "generate", "--input", source, *SHORT).stdout.split("\n")
    assert [bool(text.strip()) for text in continued[1:3]] == [False, False]


def test_hypotheses_belong_to_all_references(tmp_path: Path) -> None:
    references, hypotheses = tmp_path / "test.jsonl", tmp_path / "hypotheses"
    references.write_text(lines() + '{"source": "a", "target": ""}\n')
    hypotheses.write_text("x\n" * 7)
    arguments = ["--input", references, "--hypotheses", hypotheses]
    both = client(None, "evaluate", *arguments, "--adapter", tmp_path)
    assert (both.returncode, both.stderr.count("\n")) == (1, 1)
    assert "Leave --adapter away" in both.stderr
    assert "test.jsonl:7 has an empty target" in client(None, "evaluate", *arguments).stderr
    assert "Leave --skip-invalid away" in client(None, "evaluate", *arguments, "--skip-invalid").stderr


def test_texts_that_cannot_be_answered(url: str, task: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_bytes(b"the thin\ncaf\xe9\n" + b"die " * 600 + b"\nshine\n")
    arguments = ["--task", task, "--input", source, *SHORT]
    done = client(url, "translate", *arguments)
    assert done.returncode == 1
    assert "in.txt:2 has bytes that are not UTF-8" in done.stderr
    for files in ([], ["--output", output]):
        done = client(url, "translate", *arguments, *files, "--skip-invalid")
        assert done.returncode == 0, done.stderr
        assert "Left out 1 of 4 texts: 1 with bytes that are not UTF-8" in done.stderr
        assert "nothing left for an answer" in done.stderr
        answers = (output.read_text() if files else done.stdout).split("\n")
        assert [bool(answer) for answer in answers] == [True, False, False, True, False]


def test_standard_input_is_looked_into(build: Any) -> None:
    done, pairs = build("--validation-fraction", "0.2", stdin=json.dumps([dict(zip("ab", pair)) for pair in PAIRS]))  # noqa: B905
    assert done.returncode == 1
    assert "has the fields 'a', 'b'" in done.stderr
    done, pairs = build("--validation-fraction", "0.2", stdin=lines())
    assert done.returncode == 0, done.stderr
    assert set(pairs) < set(as_pairs())

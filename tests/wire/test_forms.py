"""A file of each form, damaged in one record, through `data check`, `build-memory`, `train` and `evaluate`."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.tiny_models import TinyModels
from tests.command_line import client, client_json
from tests.forms import CONTAINERS, RECORDS
from tests.support import make_service, serve

# Single letters, which the tiny tokenizer never joins to what stands before them.
TARGETS = ["q", "x z", "j v"]
KINDS = {
    **dict.fromkeys(("messages", "sharegpt", "turns", "alpaca"), "chat"),
    **dict.fromkeys(("answer", "answers", "squad"), "answer"),
    "label": "classify",
    "summary": "summarise",
}
SHORT = ["--minutes", 0, "--epochs", 1, "--rank", 4, "--no-search", "--selection-texts", 0, "--retrieved-examples", 0]


@pytest.fixture(scope="module")
def url(tiny_models: TinyModels) -> Iterator[str]:
    with serve(make_service(tiny_models["llama"], max_sequence_tokens=256)) as url:
        yield url


def write(folder: Path, form: str, count: int) -> tuple[Path, int]:
    """A file of the form in one of the containers, every other one gzipped, and the line of its damaged record."""
    number = list(RECORDS).index(form)
    container = list(CONTAINERS)[number % len(CONTAINERS)]
    records = [RECORDS[form](f"the {n} thin", TARGETS[n % len(TARGETS)]) for n in range(count)]
    records.insert(2, RECORDS[form]("die", ""))
    data = CONTAINERS[container](records)
    path = folder / f"{form}.{container}{'.gz' if number % 2 else ''}"
    path.write_bytes(gzip.compress(data) if number % 2 else data)
    return path, 3


@pytest.mark.parametrize("form", RECORDS)
def test_every_form_takes_the_whole_way(url: str, tmp_path: Path, form: str) -> None:
    path, line = write(tmp_path, form, 12)
    task = tmp_path / "task.toml"
    task.write_text(f'name = "tiny"\nkind = "{KINDS.get(form, "rewrite")}"\ninstruction = ""\n')
    files = ["--task", task, "--validation-fraction", 0.25, "--memory", tmp_path / "memory", "--input", path]

    checked = client(url, "data check", path, "--task", task, "--json")
    assert checked.returncode == 1, checked.stderr
    (problem,) = json.loads(checked.stdout)["problems"]
    if not path.name.removesuffix(".gz").endswith(".json"):  # whose records span lines
        assert problem["lines"] == [line + (".csv" in path.name or ".tsv" in path.name)]
    refused = client(url, "build-memory", *files)
    assert refused.returncode == 1
    assert problem["kind"] in refused.stderr

    report = client_json(url, "data check", path, "--task", task, "--skip-invalid")
    built = client_json(url, "build-memory", *files, "--skip-invalid")
    assert built["examples"] + built["validation_examples"] == report["cost"]["examples"]
    assert built["late_answers_left_out"] == report["cost"]["left_out"] == (12 if form in ("messages", "alpaca") else 0)
    client_json(url, "train", "--memory", tmp_path / "memory", "--adapter", tmp_path / "adapter", *SHORT)
    scores = client_json(
        url, "evaluate", "--adapter", tmp_path / "adapter", "--input", path, "--skip-invalid", "--max-new-tokens", 3
    )
    assert len(scores["pema_texts"]) == 12
    assert scores["pema"].keys() == scores["plm"].keys()

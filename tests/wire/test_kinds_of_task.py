"""Tasks of other kinds than rewriting over REST, from pairs to tables: built, trained, evaluated and compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from sklearn.metrics import accuracy_score

from harness.tiny_models import TinyModels
from tests.command_line import WORDS, client, client_json
from tests.support import make_service, serve

LABELS = ("thin", "die Tür", "her")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"room": {"enum": ["die", "reden"]}, "on": {"type": "boolean"}},
    "required": ["room", "on"],
    "additionalProperties": False,
}
TARGETS = {
    "classify": LABELS,
    "extract": tuple(json.dumps({"room": room, "on": on}) for room in ("die", "reden") for on in (True, False)),
}
TASKS = {
    "classify": 'name = "labels"\nkind = "classify"\n',
    "extract": """name = "fields"\nkind = "extract"\nanswer_schema = {
        type = "object", properties = { room = { enum = ["die", "reden"] }, on = { type = "boolean" } },
        required = ["room", "on"], additionalProperties = false }\n""".replace("{\n        ", "{ ").replace(
        ",\n        ", ", "
    ),
}


@pytest.fixture(scope="module")
def url(tiny_models: TinyModels) -> Iterator[str]:
    with serve(make_service(tiny_models["llama"], max_sequence_tokens=512)) as url:
        yield url


class Job:
    """Files of one kind of task, and an adapter that was trained on them."""

    def __init__(self, url: str, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.task, self.adapter = folder / "task.toml", folder / "adapter"
        self.task.write_text(TASKS[kind])
        self.files = {part: self._write(part, count) for part, count in (("train", 36), ("dev", 9), ("test", 6))}
        memory = ["--memory", folder / "memory"]
        client_json(
            url, "build-memory", "--task", self.task, "--input", self.files["train"], "--validation",
            self.files["dev"], *memory, "--share-targets",
        )  # fmt: skip
        self.trained = client_json(
            url, "train", *memory, "--adapter", self.adapter, "--rank", 8, "--epochs", 8, "--no-search", "--no-gate",
            "--retrieved-examples", 0, "--selection-texts", 6,
        )  # fmt: skip

    def _write(self, part: str, count: int) -> Path:
        """Pairs whose first word says the target."""
        targets, path = TARGETS[self.kind], self.folder / f"{part}.jsonl"
        records = [
            {
                "source": f"{WORDS[number % len(targets)]} {part} {number}",
                "target": targets[number % len(targets)],
            }
            for number in range(count)
        ]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    @property
    def targets(self) -> list[str]:
        return [json.loads(line)["target"] for line in self.files["test"].read_text().splitlines()]


@pytest.fixture(scope="module")
def jobs(url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    return {kind: Job(url, kind, tmp_path_factory.mktemp(kind)) for kind in TASKS}


def test_labels_are_evaluated(url: str, jobs: dict[str, Job], tmp_path: Path) -> None:
    job = jobs["classify"]
    assert job.trained["card"]["task"]["labels"] == sorted(LABELS), "those of the training pairs"
    picture = tmp_path / "confusions.png"
    arguments: list[Any] = ["evaluate", "--adapter", job.adapter, "--input", job.files["test"], "--share-targets"]
    found = client_json(url, *arguments, "--picture", picture)
    assert found["pema"]["accuracy"] == pytest.approx(100 * accuracy_score(job.targets, found["pema_texts"]))
    assert found["perplexity"]["mixture"] < found["perplexity"]["plm"]
    assert found["pema_details"]["calibration"]["log_loss"] < found["plm_details"]["calibration"]["log_loss"]
    assert [row["label"] for row in found["pema_details"]["labels"]] == sorted(LABELS)
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = client(url, *arguments).stdout
    for word in ("accuracy", "macro-F1", "p of the difference", "Answers by label", "die Tür", "calibration error"):
        assert word in shown


def test_fields_are_evaluated(url: str, jobs: dict[str, Job], tmp_path: Path) -> None:
    job = jobs["extract"]
    arguments: list[Any] = ["evaluate", "--adapter", job.adapter, "--input", job.files["test"]]
    found = client_json(url, *arguments)
    assert found["headline"] == "value_f1"
    for text in found["pema_texts"]:
        assert not [*Draft202012Validator(SCHEMA).iter_errors(json.loads(text))]
    assert found["pema"]["valid"] == 100
    exact = [json.loads(a) == json.loads(b) for a, b in zip(found["pema_texts"], job.targets, strict=True)]
    assert found["pema"]["exact"] == pytest.approx(100 * sum(exact) / len(exact))
    assert {row["field"] for row in found["pema_details"]["fields"]} == {"room", "on"}
    shown = client(url, *arguments).stdout
    for word in ("value F1", "Answers by field", "room"):
        assert word in shown
    done = client(url, *arguments, "--picture", tmp_path / "confusions.png")
    assert done.returncode == 1
    assert "the task fields is of the kind extract" in done.stderr


def test_answers_of_others_are_scored_by_their_task(jobs: dict[str, Job], tmp_path: Path) -> None:
    job, hypotheses, picture = jobs["classify"], tmp_path / "answers.txt", tmp_path / "confusions.png"
    answers = [LABELS[0]] * 5 + ["nothing"]
    hypotheses.write_text("".join(f"{answer}\n" for answer in answers))
    arguments: list[Any] = ["evaluate", "--input", job.files["test"], "--hypotheses", hypotheses]
    found = client_json(None, *arguments, "--task", job.task, "--picture", picture)
    assert found["scores"]["accuracy"] == pytest.approx(100 * accuracy_score(job.targets, answers))
    assert sum(row[-1] for row in found["details"]["confusion"]["counts"]) == 1, "the answer that is no label"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "macro-F1" in client(None, *arguments, "--task", job.task).stdout
    assert client_json(None, *arguments)["kind"] == "rewrite"
    for more, words in (
        (["--picture", picture], "the task rewrite is of the kind rewrite"),
        (["--adapter", job.adapter], "--hypotheses has the texts to score"),
        (["--skip-invalid"], "no pair can be left out"),
    ):
        done = client(None, *arguments, *more)
        assert done.returncode == 1
        assert words in done.stderr
    done = client(None, "evaluate", "--adapter", job.adapter, "--input", job.files["test"], "--task", job.task)
    assert "The adapter has its own task" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)  # trainings in processes of their own
@pytest.mark.parametrize(
    ("kind", "only", "headline"),
    [
        pytest.param(
            "classify",
            ["plm", "plm_nearest", "pema_published", "knn_lm", "best", "private"],
            "accuracy",
            marks=pytest.mark.transformers_only(reason="kNN-LM needs faiss, which is not installed beside vLLM"),
        ),
        ("extract", ["plm", "best"], "value_f1"),
    ],
)
def test_systems_are_compared(
    url: str, jobs: dict[str, Job], tmp_path: Path, kind: str, only: list[str], headline: str
) -> None:
    job = jobs[kind]
    files: list[Any] = [part for flag, name in (("--input", "train"), ("--validation", "dev"), ("--test", "test"))
             for part in (flag, job.files[name])]  # fmt: skip
    arguments: list[Any] = [
        "compare", *files, "--task", job.task, "--folder", tmp_path, "--no-search", "--rank", 8, "--epochs", 8,
        "--selection-texts", 4, "--retrieved-examples", 2, "--share-targets",
    ]  # fmt: skip
    arguments += [part for name in only for part in ("--only", name)]
    result = client_json(url, *arguments)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == only
    assert result["headline"] == headline
    for name, row in rows.items():
        assert set(row["scores"]) == set(result["metrics"])
        assert set(row["p_values"]) == {"plm", "plm_nearest", "pema_published"} & {*only} - {name}
        assert row["ppl"] > 1
    assert rows["best"]["ppl"] < rows["plm"]["ppl"]
    table = (tmp_path / f"{result['task']}.md").read_text()
    assert f"p of {result['metrics'][headline]['title']} against plm" in table
    assert (tmp_path / f"{result['task']}.png").read_bytes().startswith(b"\x89PNG")
    # Nothing is measured again, and a system of another program is put beside the others.
    folder = tmp_path / result["task"] / "rows"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "lora.json").write_text(json.dumps({"name": "lora", "texts": job.targets}))
    again = client_json(url, *arguments)
    assert [row["name"] for row in again["rows"]] == [*only, "lora"]
    assert again["rows"][-1]["scores"][headline] == pytest.approx(100)
    assert {path: path.stat().st_mtime_ns for path in before} == before

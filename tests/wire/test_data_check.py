"""`pema-client data check` with a server: tokens, prompts, quotas and money, before anything is sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_owner_client.data.reading.reader import read_pairs
from data_owner_client.data.tasks import Task
from data_owner_client.plm.remote_plm import RemotePlm
from harness.tiny_models import TinyModels
from plm_owner_server.admission.authentication import TenantKeyAuthenticator
from plm_owner_server.admission.ledger import Ledger
from plm_owner_server.tenants.quotas import Quotas
from plm_owner_server.tenants.store import TenantStore
from tests import guard
from tests.command_line import WORDS, client, client_json, write_pairs
from tests.support import make_service, serve

TASK = Task(name="tiny", source_label="In", target_label="Out")


@pytest.fixture(scope="module")
def url(tiny_models: TinyModels) -> Iterator[str]:
    with serve(make_service(tiny_models["llama"], max_sequence_tokens=256)) as url:
        yield url


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "task.toml"
    path.write_text('name = "tiny"\nsource_label = "In"\ntarget_label = "Out"\n')
    return path


def test_prompts_and_tokens_are_those_of_the_task(url: str, task: Path, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", 20, seed=1)
    report = client_json(url, "data check", path, "--task", task)
    assert report["task"] == "tiny"
    assert report["usable"]
    pairs = read_pairs(path)
    with RemotePlm(guard.connection(url)) as plm:
        prompts = [f"In: {pair.source}\nOut:" for pair in pairs]
        counts = [len(plm.tokenizer.encode_prompt(TASK.prompt(pair.source, plm.tokenizer))) for pair in pairs]
    for example, prompt, pair in zip(report["examples"], prompts, pairs, strict=False):
        assert example["prompt"] == prompt
        # The target token by token, with the end that is learned.
        assert len(example["target"]) > 1
        assert "".join(example["target"]) == f" {pair.target}\n"
    (part,) = report["parts"]
    assert part["unit"] == "tokens"
    assert part["sources"]["longest"] == max(counts)
    done = client(url, "data check", path, "--task", task)
    marked = "".join(f"[{token}]" for token in report["examples"][0]["target"]).replace("\n", "\\n")
    assert f"{prompts[0]}{marked}" in done.stdout


def test_what_the_model_refuses_is_a_problem_with_its_line(url: str, task: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    records = [("the thin", "die Tür"), ("the " * 300, "die"), ("an", "on\nher"), ("on", "an")]
    path.write_text("".join(json.dumps({"source": source, "target": target}) + "\n" for source, target in records))
    assert client(None, "data check", path).returncode == 0
    done = client(url, "data check", path, "--task", task, "--json")
    assert done.returncode == 1
    problems = {problem["lines"][0]: problem["kind"] for problem in json.loads(done.stdout)["problems"]}
    assert "tokens with its prompt" in problems[2]
    assert "contains the stop" in problems[3]


def test_labels_that_cannot_be_are_a_problem(url: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"text": f"the {n}", "label": f"l {n}"}) + "\n" for n in range(20)))
    done = client(url, "data check", path)
    assert done.returncode == 1
    assert "too many to be the labels" in done.stdout
    path.write_text("".join(json.dumps({"text": f"the {n}", "label": WORDS[n % 2]}) + "\n" for n in range(20)))
    assert client(url, "data check", path).returncode == 0


def test_conversations_are_rendered_by_the_models_template(url: str, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "q"}]
    turns += [{"role": "user", "content": "thin"}, {"role": "assistant", "content": "an"}]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns[2:]}) + "\n")
    private, shared = (client_json(url, "data check", path, *flag) for flag in ((), ["--share-earlier-answers"]))
    assert private["task"] == "chat"
    assert (private["cost"]["examples"], private["cost"]["left_out"]) == (2, 1)
    assert (shared["cost"]["examples"], shared["cost"]["left_out"]) == (3, 0)
    assert not any("q" in example["prompt"] for example in private["examples"])
    assert "q" in shared["examples"][1]["prompt"]
    teacher_forced = client_json(url, "data check", path, "--share-targets")
    assert (teacher_forced["cost"]["context"], teacher_forced["cost"]["examples"]) == ("teacher-forced", 3)


def test_tokens_and_money_are_what_building_uses(tiny_models: TinyModels, task: Path, tmp_path: Path) -> None:
    """The announced tokens are those that the owner's books have after the build."""
    service = make_service(tiny_models["llama"], max_sequence_tokens=256)
    store = TenantStore(f"sqlite:///{tmp_path}/owner.db")
    key = str(store.add("acme", quotas=Quotas(tokens_per_day=10_000)))
    access = TenantKeyAuthenticator(store, Ledger(store.database))
    path = write_pairs(tmp_path / "pairs.jsonl", 20, seed=1)
    dev = write_pairs(tmp_path / "dev.jsonl", 5, seed=2)
    arguments = ["--task", task, "--validation", dev, "--api-key", key]
    with serve(service, access=access) as url:
        before = _left(url, key)
        report = client_json(url, "data check", path, *arguments, "--price-per-million-tokens", 2000)
        assert _left(url, key) == before
        built = client(url, "build-memory", "--memory", tmp_path / "m", "--input", path, *arguments)
        assert built.returncode == 0, built.stderr
        used = before - _left(url, key)
    cost = report["cost"]
    assert cost["tokens"] == used
    assert cost["share_of_day"] == pytest.approx(used / 10_000)
    assert cost["money"] == pytest.approx(used * 2000 / 1e6)
    assert not cost["refused"]


def test_the_choice_of_a_classifier_is_announced(tiny_models: TinyModels, tmp_path: Path) -> None:
    """More tokens are announced than building takes, and no more than `train` uses, which also measures calls."""
    store = TenantStore(f"sqlite:///{tmp_path}/owner.db")
    key = str(store.add("acme", quotas=Quotas(tokens_per_day=100_000)))
    service = make_service(tiny_models["llama"], max_sequence_tokens=256)
    files = []
    for name in ("train", "dev"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name} {n}", "label": WORDS[n % 2]}) + "\n" for n in range(20)))
        files.append(path)
    task = tmp_path / "task.toml"
    task.write_text('name = "tiny"\nkind = "classify"\n')
    arguments = ["--task", task, "--validation", files[1], "--api-key", key]
    memory, adapter = tmp_path / "m", tmp_path / "a"
    with serve(service, access=TenantKeyAuthenticator(store, Ledger(store.database))) as url:
        announced = client_json(url, "data check", files[0], *arguments)["cost"]["tokens"]
        before = _left(url, key)
        client_json(url, "build-memory", "--memory", memory, "--input", files[0], *arguments)
        built = before - _left(url, key)
        client_json(url, "train", "--memory", memory, "--adapter", adapter, "--no-search", "--api-key", key)
        used = before - _left(url, key)
    assert built < announced <= used


def test_what_the_owner_refuses_must_be_mended(tiny_models: TinyModels, task: Path, tmp_path: Path) -> None:
    store = TenantStore(f"sqlite:///{tmp_path}/owner.db")
    key = str(store.add("acme", ["card", "decode"]))
    access = TenantKeyAuthenticator(store, Ledger(store.database))
    path = write_pairs(tmp_path / "pairs.jsonl", 20, seed=1)
    with serve(make_service(tiny_models["llama"]), access=access) as url:
        done = client(url, "data check", path, "--task", task, "--api-key", key)
    assert done.returncode == 1
    assert "Your key does not allow head" in done.stdout


def _left(url: str, key: str) -> int:
    with RemotePlm(guard.connection(url, api_key=key)) as plm:
        return next(quota.left for quota in plm.rate_limits if quota.name == "day")

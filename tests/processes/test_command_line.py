"""Both command lines as processes, on a tiny model: every verb, every refusal, and a kill in the middle."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from data_owner_client import ExternalMemory, TrainedAdapter
from data_owner_client.cli import app
from harness.processes import free_port
from harness.tiny_models import VOCAB_SIZE, TinyModels
from tests import guard
from tests.processes import parties as processes
from tests.processes.parties import client, client_json

WORDS = ["the", "thin", "die", "Tür", "an", "on", "shine", "reden", "her"]


def write_pairs(path: Path, count: int, seed: int) -> Path:
    rng = random.Random(seed)
    records = [
        {
            "source": f"{' '.join(rng.choices(WORDS, k=3))} {i}",
            "target": " ".join(rng.choices(WORDS, k=rng.randint(1, 4))),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def url(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    with processes.server(log, "--model", str(tiny_models["llama"]), "--max-sequence-tokens", "512") as url:
        yield url


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 60, seed=1)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "task.toml"
    path.write_text('name = "tiny"\nsource_label = "In"\ntarget_label = "Out"\n')
    return path


@pytest.fixture(scope="module")
def adapter(url: str, pairs: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    built = client_json(
        url, "build-memory", "--task", task, "--input", pairs, "--memory", folder / "memory", "--share-targets"
    )
    assert built["examples"] + built["validation_examples"] == 60
    assert built["context_mode"] == "teacher-forced"
    trained = client_json(
        url, "train", "--memory", folder / "memory", "--adapter", folder / "adapter",
        "--epochs", 3, "--rank", 8, "--retrieved-examples", 0, "--selection-texts", 0, "--search-minutes", 0,
    )  # fmt: skip
    assert trained["card"]["form"] == "residual"
    assert len([epoch for epoch in trained["history"] if epoch["phase"] == "joint"]) == 3
    return folder / "adapter"


def test_info(url: str) -> None:
    assert client_json(url, "info")["name"] == "llama"
    assert "hidden_size" in client(url, "info").stdout


def test_train_leaves_files_without_pickle(adapter: Path) -> None:
    assert sorted(path.name for path in adapter.iterdir()) == [
        "adapter.json",
        "adapter.safetensors",
        "training.json",
        "training.png",
    ]
    assert (adapter / "training.png").read_bytes().startswith(b"\x89PNG")
    card = TrainedAdapter.load(adapter).card
    assert card.validation["mixture_nll"] <= card.validation["plm_nll"]


def test_translate_in_all_ways(url: str, adapter: Path, task: Path, tmp_path: Path) -> None:
    sources = ["the thin", "die Tür", "an on her"]
    given = client(url, "translate", "--adapter", adapter, "--max-new-tokens", 8, *sources)
    assert given.returncode == 0, given.stderr
    assert len(given.stdout.splitlines()) == 3
    piped = client(url, "translate", "--adapter", adapter, "--max-new-tokens", 8, stdin="\n".join(sources))
    assert piped.stdout == given.stdout
    output = tmp_path / "out.txt"
    (tmp_path / "in.txt").write_text("\n".join(sources))
    client(
        url,
        "translate",
        "--adapter",
        adapter,
        "--max-new-tokens",
        8,
        "--input",
        tmp_path / "in.txt",
        "--output",
        output,
    )
    assert output.read_text() == given.stdout
    plain = client_json(url, "translate", "--adapter", adapter, "--max-new-tokens", 8, "--look-ahead", 0, *sources)
    assert [record["text"] for record in plain["texts"]] == given.stdout.splitlines()
    assert plain["usage"]["drafted"] == 0
    alone = client_json(url, "translate", "--task", task, "--max-new-tokens", 8, *sources)
    none = client_json(
        url, "translate", "--adapter", adapter, "--task", task, "--schedule", "none",
        "--max-new-tokens", 8, *sources
    )  # fmt: skip
    assert [r["text"] for r in alone["texts"]] == [r["text"] for r in none["texts"]]
    assert alone["usage"]["calls"] == 1


def test_grpc_gives_the_same_as_rest(
    tiny_models: TinyModels, pairs: Path, task: Path, adapter: Path, tmp_path: Path
) -> None:
    grpc_port = free_port()
    model = ["--model", str(tiny_models["llama"]), "--max-sequence-tokens", "512"]
    with processes.server(tmp_path / "log", *model, "--prefix-cache-mib", "0", grpc_port=grpc_port) as rest:
        grpc = guard.url("grpc", grpc_port)
        told = [client_json(url, "info") for url in (grpc, rest)]
        for info in told:
            info.pop("left", None)  # of this minute, for one
        assert told[0] == told[1]
        memories = {}
        for name, url in (("grpc", grpc), ("rest", rest)):
            folder = tmp_path / name
            client_json(url, "build-memory", "--task", task, "--input", pairs, "--memory", folder, "--share-targets")
            memories[name] = ExternalMemory(folder / "train").manifest
        assert memories["grpc"] == memories["rest"]
        translate = ["translate", "--adapter", adapter, "--max-new-tokens", 20, "the tin on", "die Tür"]
        assert client_json(grpc, *translate)["texts"] == client_json(rest, *translate)["texts"]
    assert "gRPC Encode -> OK" in (tmp_path / "log").read_text()


def test_examples_for_each_text(url: str, adapter: Path, tmp_path: Path) -> None:
    """What the PLM sees before a text changes with it; without its file, or with another, the adapter is damaged."""
    memory = ["--memory", adapter.parent / "memory", "--adapter", tmp_path]
    trained = client_json(
        url,
        "train",
        *memory,
        "--epochs",
        1,
        "--rank",
        8,
        "--retrieved-examples",
        2,
        "--selection-texts",
        3,
        "--search-minutes",
        0.05,
    )
    assert trained["card"]["nearest"] == 2
    decoded = [option for option in trained["options"] if option["chrf"] is not None]
    assert {option["interpolation"]["length_reward"] for option in decoded} == {0.0, 0.5, 1.0, 2.0}
    assert len(decoded) >= 8
    assert decoded[0]["chrf"] == max(option["chrf"] for option in decoded)
    assert trained["options"][0] == decoded[0]
    assert trained["card"]["interpolation"] == trained["options"][0]["interpolation"]
    texts = ["the thin", "die Tür"]
    own = client_json(url, "translate", "--adapter", tmp_path, "--schedule", "none", "--max-new-tokens", 8, *texts)
    fixed = client_json(url, "translate", "--adapter", adapter, "--schedule", "none", "--max-new-tokens", 8, *texts)
    assert own["texts"] != fixed["texts"]
    pairs = write_pairs(tmp_path / "test.jsonl", 3, seed=9)
    scores = client_json(url, "evaluate", "--adapter", tmp_path, "--input", pairs, "--share-targets")
    assert scores["perplexity"]["tokens"] > 0
    (tmp_path / "pairs.jsonl").write_text('{"source": "a", "target": "b"}\n')
    damaged = client(url, "translate", "--adapter", tmp_path, "the thin")
    assert damaged.returncode == 1
    assert "damaged" in damaged.stderr


def test_sweep(url: str, adapter: Path, tmp_path: Path) -> None:
    grid = ["--rank", 2, "--rank", 4, "--form", "paper", "--schedule", "constant", "--lambda-max", 0.3, "--examples", 9]
    arguments = ["sweep", "--memory", adapter.parent / "memory", "--folder", tmp_path, *grid]
    rows = client_json(url, *arguments)
    assert [(row["rank"], row["form"], row["lambda_max"]) for row in rows] == [(2, "paper", 0.3), (4, "paper", 0.3)]
    assert "train_seconds" in client(url, *arguments).stdout
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 3
    refused = client(url, *arguments, "--schedule", "steep")
    assert refused.returncode == 2
    assert 'Invalid value "steep" for --schedule. Choose from: "gradual", "linear"' in refused.stderr


@pytest.mark.timeout(900)  # ten systems, four of them trained in processes of their own
def test_compare(url: str, task: Path, tmp_path: Path) -> None:
    splits: list[Any] = []
    for seed, (name, count) in enumerate({"input": 40, "validation": 6, "test": 4}.items(), 20):
        splits += [f"--{name}", write_pairs(tmp_path / f"{name}.jsonl", count, seed=seed)]
    arguments = [
        *splits,
        "--task",
        task,
        "--folder",
        tmp_path / "compare",
        "--search-minutes",
        0,
        "--selection-texts",
        1,
    ]
    refused = client(url, "compare", *arguments)
    assert refused.returncode == 1
    assert "--share-targets" in refused.stderr
    unknown = client(url, "compare", *arguments, "--share-targets", "--only", "gpt")
    assert "no system gpt" in unknown.stderr
    result = client_json(url, "compare", *arguments, "--share-targets")
    rows = {row["name"]: row for row in result["rows"]}
    assert set(rows) == {
        "plm", "plm_nearest", "pema_published", "constant", "knn_lm", "residual", "without_length_reward",
        "most_probable", "best", "private", "private_by_position",
    }  # fmt: skip
    assert rows["private"]["client_discloses"] < rows["best"]["client_discloses"]
    for name, row in rows.items():
        assert 0 <= row["chrf"] <= 100
        assert row["ppl"] > 1
        assert (row["p_value_chrf_vs_published"] is None) == (name == "pema_published")
        assert (row["train_seconds"] > 0) == (row["peak_rss_mb"] is not None) == (not name.startswith("plm"))
    written = json.loads((tmp_path / "compare" / "tiny.json").read_text())
    assert written == result
    assert "| **best**" in (tmp_path / "compare" / "tiny.md").read_text()
    assert (tmp_path / "compare" / "tiny.png").read_bytes().startswith(b"\x89PNG")
    # A row of another system is put beside ours; nothing is measured again.
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "compare" / "tiny" / "rows").iterdir()}
    other = {"name": "lora", "texts": ["die"] * 4, "train_seconds": 5.0}
    (tmp_path / "compare" / "tiny" / "rows" / "lora.json").write_text(json.dumps(other))
    again = client_json(url, "compare", *arguments, "--share-targets")
    assert [row["name"] for row in again["rows"]] == [*rows, "lora"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.parametrize("flag", ["--port", "--grpc-port"])
def test_a_port_in_use_is_said(tiny_models: TinyModels, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = {"--port": str(free_port()), "--grpc-port": "0", flag: str(taken.getsockname()[1])}
        flags = [part for pair in ports.items() for part in pair]
        command = [sys.executable, "-m", "plm_owner_server.cli", "serve", *flags, "--model", tiny_models["llama"]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert ports[flag] in done.stderr.splitlines()[-1]
    assert f"another {flag}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_generate(url: str, adapter: Path) -> None:
    bare = client_json(url, "generate", "--max-new-tokens", 6, "the thin")
    assert bare["usage"]["tokens"] <= 6
    adapted = client_json(url, "generate", "--adapter", adapter, "--max-new-tokens", 6, "the thin", "her")
    assert len(adapted["texts"]) == 2


def test_a_file_with_a_text_that_is_too_long_goes_on_once_it_is_mended(url: str, adapter: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.txt", tmp_path / "out.txt"
    lines = ["the thin", "die " * 600, "shine on"]
    arguments = ["--adapter", adapter, "--input", source, "--output", output]
    source.write_text("\n".join(lines) + "\n")
    done = client(url, "translate", *arguments)
    assert done.returncode == 1
    assert "text 2: The prompt of text 2 has" in done.stderr
    assert "1 of 3 texts have no answer, text 2 for one; the others are stored" in done.stderr
    assert not output.exists()
    again = client(url, "translate", *arguments)  # the same failure, and nothing else is done again
    assert again.returncode == 1
    source.write_text("\n".join([lines[0], "die", lines[2]]) + "\n")
    done = client(url, "translate", *arguments)
    assert done.returncode == 0, done.stderr
    assert "3 texts (2 of them done before)" in done.stderr
    assert "round trips per token" in done.stderr
    assert len(output.read_text().splitlines()) == 3
    assert sorted(tmp_path.iterdir()) == [source, output]


def test_stream_and_explain(url: str, adapter: Path, tmp_path: Path) -> None:
    arguments = ["--adapter", adapter, "--schedule", "constant", "--lambda-max", 0.6, "--dtype", "float32"]
    (plain,) = client_json(url, "translate", *arguments, "the thin")["texts"]
    assert client(url, "translate", *arguments, "--stream", "the thin").stdout == plain["text"] + "\n"
    done = client(url, "translate", *arguments, "--stream", "the thin", "her")
    assert done.returncode == 1
    assert "one text" in done.stderr
    client_json(url, "translate", *arguments, "--explain", tmp_path / "why.jsonl", "the thin", "her")
    first, second = map(json.loads, (tmp_path / "why.jsonl").read_text().splitlines())
    assert (first["text"], second["source"]) == (plain["text"], "her")
    for token in [*first["tokens"], *second["tokens"]]:
        assert token["lambda"] == 0.6
        assert token["p"] == pytest.approx(0.4 * token["p_plm"] + 0.6 * token["p_pema"])
        assert token["token"] in (token["plm_alone"], token["pema_alone"]) or token["p_plm"] * token["p_pema"] > 0


def test_sampling_and_lookup(url: str, adapter: Path, task: Path, pairs: Path, tmp_path: Path) -> None:
    drawn = ["--adapter", adapter, "--temperature", 1.2, "--seed", 4, "--max-new-tokens", 8]
    if guard.current:  # without the whole head
        drawn += ["--candidates-only"]
    one = client_json(url, "translate", *drawn, "the thin", "shine on")
    assert one == client_json(url, "translate", *drawn, "--look-ahead", 0, "the thin", "shine on") | {
        "usage": one["usage"]
    }
    three = client_json(url, "translate", *drawn, "--samples", 5, "--best", 3, "the thin")
    (text,) = three["texts"]
    assert text["text"] == text["best"][0]
    assert len(set(text["best"])) > 1
    for arguments, words in (
        (["--samples", 2], "Without a temperature"),
        (["--temperature", 1, "--best", 2], "Give more --samples"),
        (["--temperature", 1, "--samples", 2, "--consensus", 4], "Give one of them"),
        (["--consensus", 4, "--stream"], "Leave --consensus"),
    ):
        done = client(url, "translate", "--adapter", adapter, *arguments, "the thin")
        assert done.returncode == 1
        assert words in done.stderr

    done = client(url, "translate", "--task", task, "--temperature", 1, "--candidates-only", "the thin")
    assert done.returncode == 1
    assert "no candidates" in done.stderr

    memory = adapter.parent / "memory"
    plain = client_json(url, "translate", "--adapter", adapter, "the thin")
    looked_up = client_json(url, "translate", "--adapter", adapter, "--lookup", memory, "the thin")
    assert looked_up["texts"] == plain["texts"]
    client_json(url, "build-memory", "--task", task, "--input", pairs, "--memory", tmp_path)
    done = client(url, "translate", "--adapter", adapter, "--lookup", tmp_path, "the thin")
    assert done.returncode == 1
    assert "never shown to the PLM's owner" in done.stderr


def test_evaluate(url: str, adapter: Path, tmp_path: Path) -> None:
    test = write_pairs(tmp_path / "test.jsonl", 7, seed=2)
    scores = client_json(url, "evaluate", "--adapter", adapter, "--input", test, "--max-new-tokens", 8)
    assert scores["perplexity"] is None, "perplexity would show the references"
    assert "nrefs:1" in scores["pema"]["bleu_signature"]
    assert "nrefs:1" in scores["pema"]["chrf_signature"]
    shared = client_json(
        url, "evaluate", "--adapter", adapter, "--input", test, "--max-new-tokens", 8, "--share-targets"
    )
    assert shared["perplexity"]["mixture"] > 1
    assert shared["pema"] == scores["pema"]
    table = client(url, "evaluate", "--adapter", adapter, "--input", test, "--max-new-tokens", 8, "--share-targets")
    assert "PLM + adapter" in table.stdout
    references = [json.loads(line)["target"] for line in test.read_text().splitlines()]
    (tmp_path / "hypotheses.txt").write_text("\n".join(references))
    perfect = client_json(None, "evaluate", "--input", test, "--hypotheses", tmp_path / "hypotheses.txt")
    assert perfect["chrf"] == pytest.approx(100)


def test_what_leaves_the_machine_is_said(url: str, pairs: Path, task: Path, tmp_path: Path) -> None:
    arguments = ["--input", pairs, "--task", task, "--memory"]
    private = client(url, "build-memory", *arguments, tmp_path / "private")
    assert private.returncode == 0
    assert "No target text" in private.stderr
    shared = client(url, "build-memory", *arguments, tmp_path / "shared", "--share-targets")
    assert shared.returncode == 0
    assert "every target text" in shared.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build-memory", "--input", "PAIRS", "--context", "teacher-forced"], "--share-targets"),
        (["build-memory", "--input", "missing.jsonl"], "cannot be read"),
        (["build-memory", "--input", "PAIRS", "--task", "nonsense"], "built-in task"),
        (["build-memory", "--sources", "PAIRS"], "--sources with --targets"),
        (["train", "--memory", "nowhere"], "holds no memory"),
        (["translate", "--adapter", "nowhere", "text"], "holds no adapter"),
        (["translate", "text"], "Give one with --task"),
        (["translate", "--task", "translate-en-de", "x" * 2000], "Shorten"),
        (["evaluate", "--input", "PAIRS"], "--adapter"),
    ],
)
def test_mistakes_end_with_one_clear_line(
    url: str, pairs: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = subprocess.run(
        processes.client_command(url, arguments[0], *[str(pairs) if a == "PAIRS" else a for a in arguments[1:]]),
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("pema-client: ")
    assert message in last


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_that_is_not_there_is_explained(scheme: str) -> None:
    from data_owner_client import connect
    from protocol.errors import ConnectionFailed, InvalidRequest

    with pytest.raises(ConnectionFailed, match="pema-server serve"):
        connect(guard.url(scheme, free_port()), **guard.credentials())
    with pytest.raises(InvalidRequest, match="no address"):
        connect("localhost:8000")


@pytest.fixture(scope="module")
def many(url: str, task: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    """The arguments of a build of several shards, and the memory of an undisturbed one."""
    folder = tmp_path_factory.mktemp("many")
    pairs = write_pairs(folder / "many.jsonl", 1700, seed=3)
    arguments = ["--task", task, "--input", pairs, "--share-targets", "--memory"]
    client_json(url, "build-memory", *arguments, folder / "memory")
    return arguments, folder / "memory"


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_build_is_resumed_by_the_same_command(
    url: str, many: tuple[list[Any], Path], tmp_path: Path, seed: int
) -> None:
    arguments, undisturbed = many
    rng = random.Random(seed)
    for _ in range(2):
        process = subprocess.Popen(
            processes.client_command(url, "build-memory", *arguments, tmp_path), stderr=subprocess.DEVNULL
        )
        _kill_when_shards_grow(process, tmp_path / "train", rng)
    client_json(url, "build-memory", *arguments, tmp_path)
    for part in ("train", "validation"):
        ours = ExternalMemory(tmp_path / part)
        assert ours.manifest == ExternalMemory(undisturbed / part).manifest
        ours.load()  # checks every checksum


@pytest.mark.unguarded("needs the whole head")
def test_the_full_vocabulary(url: str, many: tuple[list[Any], Path], tmp_path: Path) -> None:
    what = [
        "--memory",
        many[1],
        "--adapter",
        tmp_path,
        "--epochs",
        1,
        "--rank",
        8,
        "--search-minutes",
        0,
        "--selection-texts",
        2,
    ]
    card = client_json(url, "train", *what, "--full-vocabulary")["card"]
    assert card["candidates"] == VOCAB_SIZE
    assert card["validation"]["coverage"] == 1.0
    translated = client_json(url, "translate", "--adapter", tmp_path, "one two", "--max-new-tokens", 4)
    assert translated["texts"][0]["text"] is not None


def test_a_killed_training_is_resumed_by_the_same_command(
    url: str, many: tuple[list[Any], Path], tmp_path: Path
) -> None:
    def arguments(adapter: str) -> list[Any]:
        return [
            "--memory",
            many[1],
            "--adapter",
            tmp_path / adapter,
            "--rank",
            8,
            "--learning-rate",
            3e-4,
            "--search-minutes",
            0,
            # A gate behind examples of their own is fitted to what the server computes, and rounds, anew.
            "--retrieved-examples",
            0,
            "--selection-texts",
            2,
        ]

    client_json(url, "train", *arguments("undisturbed"))
    killed = tmp_path / "killed"
    for epochs in (1, 4):
        process = subprocess.Popen(
            processes.client_command(url, "train", *arguments("killed")), stderr=subprocess.DEVNULL
        )
        while len(_history(killed)) < epochs:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    trained = client_json(url, "train", *arguments("killed"))
    assert len(trained["history"]) > 4
    assert not list(killed.glob(".*"))
    for name in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def _history(folder: Path) -> list[Any]:
    checkpoints = list(folder.glob(".training-*.safetensors"))
    if not checkpoints:
        return []
    with safe_open(checkpoints[0], framework="pt") as file:
        history: list[Any] = json.loads(file.metadata()["progress"])["history"]
        return history


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_that_is_killed_and_comes_back_costs_nothing_but_time(
    tiny_models: TinyModels, many: tuple[list[Any], Path], tmp_path: Path, scheme: str
) -> None:
    arguments, undisturbed = many
    ports, log = [free_port(), free_port()], tmp_path / "log"
    model = ["--model", str(tiny_models["llama"]), "--max-sequence-tokens", "512"]
    server = processes.start_server(log, *ports, *model)
    try:
        processes.wait_until_ready(server, guard.url("http", ports[0]), log)
        url = guard.url(scheme, ports[scheme == "grpc"])
        command = processes.client_command(url, "build-memory", *arguments, tmp_path)
        client_process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while not list((tmp_path / "train").glob("shard-*")):
            assert client_process.poll() is None
            time.sleep(0.005)
        server.kill()
        server.wait()
        time.sleep(1)
        assert client_process.poll() is None, "it waits for the server to come back"
        server = processes.start_server(log, *ports, *model)
        assert client_process.wait(timeout=200) == 0
    finally:
        server.terminate()
        server.wait()
    for part in ("train", "validation"):
        assert ExternalMemory(tmp_path / part).manifest == ExternalMemory(undisturbed / part).manifest


def _kill_when_shards_grow(process: "subprocess.Popen[bytes]", folder: Path, rng: random.Random) -> None:
    """SIGKILL at a random moment after one more shard is there, or once the process has ended."""
    before = len(list(folder.glob("shard-*")))
    while process.poll() is None and len(list(folder.glob("shard-*"))) <= before:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_help_has_examples() -> None:
    for verb in (name for name in app if not name.startswith("-")):
        shown = client(None, verb, "--help").stdout
        assert f"pema-client {verb}" in shown
    done = subprocess.run(
        [sys.executable, "-m", "plm_owner_server.cli", "serve", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pema-server serve --model smollm2-135m" in done.stdout
    assert "--max-sequence-tokens" in done.stdout


def test_server_settings_come_from_flags_and_environment() -> None:
    command = [sys.executable, "-m", "plm_owner_server.cli", "serve"]
    environment = os.environ | {"PEMA_PORT": "700000"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode != 0
    assert "--port (or its environment variable)" in done.stderr
    unknown = subprocess.run([*command, "--model", "/no/such/folder"], capture_output=True, text=True, check=False)
    assert unknown.returncode != 0
    assert "neither an embedded model" in unknown.stderr

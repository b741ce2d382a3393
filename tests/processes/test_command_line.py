"""Both command lines as processes: kills in the middle, interrupts, pipes, exit statuses, ports in use."""

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

from data_owner_client import ExternalMemory
from harness.processes import free_port
from harness.tiny_models import TinyModels
from tests import guard
from tests.command_line import write_pairs
from tests.processes import parties as processes
from tests.processes.parties import client, client_json


@pytest.fixture(scope="module")
def url(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    with processes.server(log, "--model", str(tiny_models["llama"]), "--max-sequence-tokens", "512") as url:
        yield url


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "task.toml"
    path.write_text('name = "tiny"\nsource_label = "In"\ntarget_label = "Out"\n')
    return path


@pytest.fixture(scope="module")
def many(url: str, task: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    """The arguments of a build of several shards, and the memory of an undisturbed one."""
    folder = tmp_path_factory.mktemp("many")
    pairs = write_pairs(folder / "many.jsonl", 1700, seed=3)
    arguments = ["--task", task, "--input", pairs, "--share-targets", "--memory"]
    client_json(url, "build-memory", *arguments, folder / "memory")
    return arguments, folder / "memory"


def test_pairs_pass_through_a_pipe(url: str, task: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 20, seed=5)
    arguments = ["--task", task, "--share-targets", "--memory"]
    piped = client(
        url,
        "build-memory",
        *arguments,
        tmp_path / "piped",
        "--format",
        "jsonl",
        stdin=pairs.read_text(encoding="utf-8"),
    )
    assert piped.returncode == 0, piped.stderr
    client_json(url, "build-memory", *arguments, tmp_path / "read", "--input", pairs)
    for part in ("train", "validation"):
        assert ExternalMemory(tmp_path / "piped" / part).manifest == ExternalMemory(tmp_path / "read" / part).manifest


def test_a_mistake_is_an_exit_status_and_one_clear_line(url: str) -> None:
    for arguments, status in ((["translate", "text"], 1), (["translate", "--no-such-option"], 2)):
        done = client(url, *arguments)
        assert done.returncode == status
        assert "Traceback" not in done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("pema-client: ")


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


def test_an_interrupted_build_says_how_to_go_on(url: str, task: Path, tmp_path: Path) -> None:
    # So many that the build has long not ended when the first shard is seen.
    pairs = write_pairs(tmp_path / "pairs.jsonl", 6000, seed=4)
    arguments = ["--task", task, "--input", pairs, "--share-targets", "--memory", tmp_path / "memory"]
    # Tests in the background of a shell ignore the signal, and so would the client.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        processes.client_command(url, "build-memory", *arguments), stderr=subprocess.PIPE, text=True
    )
    while not list((tmp_path / "memory" / "train").glob("shard-*")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("pema-client: interrupted; run the same command again")


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
            "--no-search",
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
    # Read in one piece: the training may replace the file meanwhile, and `safe_open` opens it twice.
    content = checkpoints[0].read_bytes()
    size = int.from_bytes(content[:8], "little")
    history: list[Any] = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["progress"])["history"]
    return history


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_that_is_killed_and_comes_back_costs_nothing_but_time(
    tiny_models: TinyModels, many: tuple[list[Any], Path], tmp_path: Path, scheme: str
) -> None:
    arguments, undisturbed = many
    ports, log = (free_port(), free_port()), tmp_path / "log"
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
        "--no-search",
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
        "most_probable", "beams", "best", "private", "private_by_position",
    }  # fmt: skip
    assert rows["private"]["client_discloses"] < rows["best"]["client_discloses"]
    for name, row in rows.items():
        assert 0 <= row["scores"]["chrf"] <= 100
        assert row["ppl"] > 1
        assert set(row["p_values"]) == {"plm", "plm_nearest", "pema_published"} - {name}
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
        command = [sys.executable, "-m", "plm_owner_server.cli", "serve", *flags, "--model", str(tiny_models["llama"])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    # The model may begin to load meanwhile, in a thread that writes lines of its own.
    [error] = [line for line in done.stderr.splitlines() if line.startswith("pema-server: ")]
    assert ports[flag] in error
    assert f"another {flag}" in error
    assert "Traceback" not in done.stderr


def test_help_of_the_server_has_examples() -> None:
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

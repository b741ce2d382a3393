"""Standard output and standard error of both command lines as processes: encodings, terminals, readers that leave."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from harness.tiny_models import TinyModels
from tests.command_line import write_pairs
from tests.processes import parties

CLIENT = [sys.executable, "-m", "data_owner_client.cli"]
SERVER = [sys.executable, "-m", "plm_owner_server.cli"]
NOWHERE = ["--server", "http://127.0.0.1:1", "--retry-for", "0"]
NOT_UTF8 = os.fsdecode(b"caf\xe9")
ENCODINGS = [{"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}]


def run(
    command: Sequence[str | Path], environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, capture_output=True, env=os.environ | dict(environment or {}), check=False)


@pytest.mark.unguarded("no server")
@pytest.mark.parametrize("environment", ENCODINGS, ids=lambda each: each["PYTHONIOENCODING"])
@pytest.mark.parametrize(
    "command", [[*CLIENT, "train", "--help"], [*SERVER, "serve", "--help"]], ids=("client", "server")
)
def test_help_is_utf8_in_a_pipe(command: list[str], environment: dict[str, str]) -> None:
    done = run(command, environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == run(command, {"PYTHONIOENCODING": "utf-8"}).stdout
    if command[2] == "data_owner_client.cli":
        assert "κ" in done.stdout.decode()
        assert "λ" in done.stdout.decode()


@pytest.mark.unguarded("no server")
def test_a_terminal_gets_what_it_can_show() -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "TERM": "dumb"}
    process = subprocess.Popen([*CLIENT, "train", "--help"], stdout=theirs, stderr=subprocess.PIPE, env=environment)
    os.close(theirs)
    shown = b""
    while part := _read(ours):
        shown += part
    os.close(ours)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (0, b"")
    assert shown.isascii()
    assert b"?_max" in shown


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux: the other side is closed
        return b""


@pytest.mark.unguarded("no server")
@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        (["translate", *NOWHERE, "good", NOT_UTF8], {}, 'Invalid value "caf?" for TEXTS. It is not UTF-8.'),
        (["generate", *NOWHERE, NOT_UTF8], {}, 'Invalid value "caf?" for PROMPTS. It is not UTF-8.'),
        (["build-memory", *NOWHERE, "--source-field", NOT_UTF8], {}, '"caf?" for --source-field. It is not UTF-8.'),
        (["info"], {"PEMA_SERVER": NOT_UTF8}, '"caf?" for PEMA_SERVER provided by env. It is not UTF-8.'),
        (["train", f"--{NOT_UTF8}"], {}, "Unknown option: --caf?."),
        ([NOT_UTF8], {}, 'Unknown command "caf?".'),
    ],
)
def test_the_client_names_an_argument_that_is_not_utf8(
    arguments: list[str], environment: dict[str, str], named: str
) -> None:
    done = run([*CLIENT, *arguments], environment)
    (line,) = done.stderr.decode().splitlines()
    assert named in line
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.unguarded("no server")
@pytest.mark.parametrize(
    ("arguments", "environment", "flag"),
    [
        (["serve", "--revision", NOT_UTF8], {}, "--revision"),
        (["serve"], {"PEMA_MODEL": NOT_UTF8}, "--model"),
        (["tenants", "rotate-key", NOT_UTF8], {}, "--name"),
    ],
)
def test_the_server_names_an_argument_that_is_not_utf8(
    arguments: list[str], environment: dict[str, str], flag: str
) -> None:
    done = run([*SERVER, *arguments], environment)
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith(f"pema-server: {flag} (or its environment variable): 'caf\\udce9' is not UTF-8.")
    assert done.returncode == 1


@pytest.mark.unguarded("no server")
def test_paths_that_are_not_utf8_are_usable(tmp_path: Path) -> None:
    folder = tmp_path / NOT_UTF8
    folder.mkdir()
    for name in ("sources", "targets", "hypotheses"):
        (folder / name).write_text("Zażółć 🙂\n", encoding="utf-8")
    files = [part for name in ("sources", "targets", "hypotheses") for part in (f"--{name}", folder / name)]
    done = run([*CLIENT, "evaluate", *files], {"PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/caf?/hypotheses" in done.stdout.decode()
    missing = run([*CLIENT, "evaluate", *NOWHERE, "--adapter", folder / "none", *files[:4]])
    assert f"{tmp_path}/caf?/none" in missing.stderr.decode()
    assert b"Traceback" not in missing.stderr
    store = ["--store", f"sqlite:///{folder}/owner.db"]
    assert run([*SERVER, "tenants", "add", "acme", *store]).returncode == 0
    assert b"acme" in run([*SERVER, "tenants", "list", *store]).stdout


@pytest.mark.unguarded("no server")
@pytest.mark.parametrize(
    "command", [[*CLIENT, "train", "--help"], [*SERVER, "serve", "--help"]], ids=("client", "server")
)
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_leaves_is_no_error(command: list[str], stream: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: writing}
    process = subprocess.Popen(command, stdout=streams["stdout"], stderr=streams["stderr"])
    os.close(writing)
    output, errors = process.communicate()
    assert process.returncode == 0
    assert not errors
    assert bool(output) == (stream == "stderr")


@pytest.fixture(scope="module")
def url(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    with parties.server(log, "--model", str(tiny_models["llama"]), "--max-sequence-tokens", "512") as url:
        yield url


def test_the_main_job_in_folders_of_any_name(url: str, tmp_path: Path) -> None:
    """Brackets and bytes that are not UTF-8 in names; a locale without Greek or Polish; nobody reads the progress."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", 60, seed=1)
    memory, adapter = tmp_path / f"m[draft]{NOT_UTF8}", tmp_path / f"a[b]{NOT_UTF8}"
    task = tmp_path / "t[x].toml"
    task.write_text('name = "tiny [/b] $x"\nsource_label = "In"\ntarget_label = "Out"\n', encoding="utf-8")
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    reading, writing = os.pipe()
    os.close(reading)

    def client(verb: str, *arguments: object, stderr: int = writing) -> str:
        command = parties.client_command(url, verb, *arguments)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode()

    try:
        built = client("build-memory", "--task", task, "--input", pairs, "--memory", memory, "--share-targets")
        assert f"{tmp_path}/m[draft]caf?" in built
        trained = client(
            *("train", "--memory", memory, "--adapter", adapter, "--rank", 8, "--epochs", 1),
            *("--minutes", 0, "--retrieved-examples", 0, "--selection-texts", 0),
        )
        assert f"{tmp_path}/a[b]caf?" in trained
        assert json.loads((adapter / "training.json").read_bytes())["folder"].endswith("/a[b]caf?")
        checked = client("doctor", "--memory", memory, "--adapter", adapter)
        assert f"{tmp_path}/m[draft]caf?" in checked
        output = tmp_path / f"out[b]{NOT_UTF8}"
        client("translate", "--adapter", adapter, "--output", output, "the door")
        assert len(output.read_bytes().splitlines()) == 1
    finally:
        os.close(writing)
    digest = json.loads(client("info", "--json", stderr=subprocess.DEVNULL))["digest"]
    assert digest in client("info", stderr=subprocess.DEVNULL)


def test_a_build_tells_its_progress_in_a_log(url: str, tmp_path: Path) -> None:
    task = tmp_path / "task.toml"
    task.write_text('name = "tiny"\nsource_label = "In"\ntarget_label = "Out"\n', encoding="utf-8")
    pairs = write_pairs(tmp_path / "pairs.jsonl", 30, seed=2)
    done = parties.client(
        url, "build-memory", "--task", task, "--input", pairs, "--memory", tmp_path / "memory", "--share-targets"
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("memory train: ")]
    assert re.fullmatch(r"memory train: (\d+) of \1 examples in 0:\d\d:\d\d, [\d.,]+ examples/s, \d+ rows", line)

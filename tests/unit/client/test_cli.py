"""The command line itself: names, values, messages and exit statuses. No command here reaches a server."""

import errno
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cyclopts import App, Token

from data_owner_client.cli import app, run
from data_owner_client.cli.old_names import REMOVED_FLAGS, RENAMED_FLAGS, with_current_names
from data_owner_client.cli.options import DEFAULT_SERVER, connected
from data_owner_client.plm.connection.settings import ConnectionSettings
from data_owner_client.runtime.declared_settings import declared_settings, varied_names
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.sweep import Grid
from protocol.errors import InvalidRequest

NOWHERE = ["--server", "http://127.0.0.1:1"]


@pytest.mark.parametrize(("old", "new"), RENAMED_FLAGS.items())
def test_an_old_flag_works_with_one_line_of_warning(old: str, new: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert with_current_names(["train", old, "3", "--", old]) == ["train", new, "3", "--", old]
    assert with_current_names(["train", f"{old}=3"]) == ["train", f"{new}=3"]
    warned = capsys.readouterr().err.splitlines()
    assert warned == [f"pema-client: {old} is now {new}; the old name works until version 0.3."] * 2
    assert any(option in names for names in _options() for option in [new])


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave it as it is in `--output=~/texts`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = set()
    for command in _commands(app):
        for argument in command.assemble_argument_collection():
            if "Path" in str(argument.hint) and not argument.name.startswith(("--ca", "--client-")):
                argument.append(Token(keyword=argument.name, value="~/x", source="cli"))
                value = argument.convert()
                assert value in (tmp_path / "x", [tmp_path / "x"]), (command.name, argument.name)
                seen.add(argument.name)
    assert seen >= {"--input", "--output", "--explain", "--memory", "--adapter", "--folder", "--lookup", "--hypotheses"}
    settings = ConnectionSettings(ca=Path("~/ca"), client_certificate=Path("~/c"), client_key=Path("~/k"))
    assert (settings.ca, settings.client_key) == (tmp_path / "ca", tmp_path / "k")
    assert settings.client_certificate == tmp_path / "c"


def _options() -> list[tuple[str, ...]]:
    return [argument.names for command in _commands(app) for argument in command.assemble_argument_collection()]


def _commands(parent: App) -> Iterator[App]:
    """All commands, those of groups included."""
    for name in parent:
        if not name.startswith("-"):
            command = parent[name]
            yield from [command] if command.default_command else _commands(command)


def test_old_values_of_a_flag_work_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert with_current_names(["train", "--pairing", "sure"]) == ["train", "--pairing", "reliable"]
    assert with_current_names(["train", "--pairing=position"]) == ["train", "--pairing=by_position"]
    assert with_current_names(["translate", "sure"]) == ["translate", "sure"]
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize("flag", REMOVED_FLAGS)
def test_a_removed_flag_is_refused_with_the_reason(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", flag]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pema-client: {flag} was removed: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--rank", "0"], 'Invalid value "0" for --rank. Input should be greater than or equal to 1.'),
        (["train", "--rank", "many"], 'Invalid value for --rank: unable to convert "many" into int.'),
        (["train", "--form", "own"], 'Invalid value "own" for --form. Choose from: "paper", "residual", "recent".'),
        (["train", "--dropout=nan"], 'Invalid value "nan" for --dropout.'),
        (["sweep", "--kappa", "0.5", "--kappa", "2"], "for --kappa. Input should be less than or equal to 1."),
        (["translate", "--length-reward", "-1", "text"], 'Invalid value "-1.0" for --length-reward.'),
        (["info", "--timeout", "0"], 'Invalid value "0.0" for --timeout.'),
        (["info", "--timeout", "inf"], 'Invalid value "inf" for --timeout.'),
        (["train", "--minutes", "inf"], 'Invalid value "inf" for --minutes.'),
        (["info", "--bogus"], "Unknown option: --bogus."),
        (["translate", "-5 °C"], "Put -- before texts that begin with a hyphen."),
        (["generate", "- item"], "Put -- before texts that begin with a hyphen."),
        (["info", "more"], "Unexpected argument 'more'."),
        (["info", "--server"], "--server requires an argument."),
        (["compare"], "--input requires an argument."),
        (["frobnicate"], 'Unknown command "frobnicate".'),
    ],
)
def test_a_mistake_in_the_command_line_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("pema-client: ")
    assert message in line
    assert line.endswith("--help.")
    assert printed.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["translate", *NOWHERE, "text"], "No answer from http://127.0.0.1:1"),
        (["apply", *NOWHERE, "-1", "--", "--text"], "No answer from http://127.0.0.1:1"),
        (["info", "--server", "nowhere"], "is not the address of a PLM server"),
        (["translate", *NOWHERE, "--input", "missing.txt"], "cannot be read"),
    ],
)
def test_an_error_of_the_work_is_one_line_and_status_1(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("file", ["disk/model.txt", None])
def test_a_fault_of_the_machine_is_one_line(
    file: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", file)

    monkeypatch.setattr("data_owner_client.cli.connection.connected", fail)
    assert run(["info"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pema-client: {file or 'standard output or a file'} cannot be used: No space left")


def test_an_empty_address_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("data_owner_client.plm.connect.connect", lambda server, *_, **__: asked.append(server))
    for value in ("", " \n"):
        monkeypatch.setenv("PEMA_SERVER", value)
        _, bound, _ = app.parse_args(["info"])
        connected(bound.arguments["server"], ConnectionSettings())
    assert asked == [DEFAULT_SERVER] * 2


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&- 0<&-"])
@pytest.mark.parametrize("program", ["data_owner_client", "plm_owner_server"])
def test_closed_streams_are_no_reason_to_fail(program: str, closed: str) -> None:
    command = f"exec {shlex.quote(sys.executable)} -m {program}.cli --version {closed}"
    process = subprocess.run(["/bin/sh", "-c", command], capture_output=True, check=False)
    assert process.returncode == 0
    assert b"Traceback" not in process.stderr


@pytest.mark.parametrize("program", ["data_owner_client", "plm_owner_server"])
def test_the_programs_run_without_docstrings(program: str) -> None:
    """As with PYTHONOPTIMIZE=2, in containers that save memory."""
    verb = "train" if program == "data_owner_client" else "serve"
    command = [sys.executable, "-OO", "-m", f"{program}.cli", verb, "--help"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (0, "")
    assert "--" in process.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("program", ["data_owner_client", "plm_owner_server"])
def test_a_full_disk_behind_standard_output_is_one_line(program: str) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", f"{program}.cli", "--version"]
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert "No space left on device" in line


def test_verbose_stands_anywhere_and_logs_requests(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--verbose", "info", *NOWHERE], ["info", *NOWHERE, "--verbose"]):
        assert run(arguments) == 1
        assert "GET /v1/model failed" in capsys.readouterr().err
    assert run(["info", *NOWHERE]) == 1
    assert "GET /v1/model failed" not in capsys.readouterr().err


def test_an_interrupt_has_the_shells_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data_owner_client.cli.connection.connected", interrupted)
    assert run(["info"]) == 130
    assert "interrupted; run the same command again" in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out[0].isdigit()
    assert run([]) == run(["--help"]) == 0
    assert "apply (translate)" in capsys.readouterr().out
    assert run(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("pema-client train --memory", "Connection", "--no-gate", "default: 512", "PEMA_API_KEY"):
        assert words in shown


def test_the_environment_sets_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "PEMA_SERVER": "http://here",
        "PEMA_API_KEY": "-k",
        "PEMA_CA": "a",
        "PEMA_CLIENT_CERTIFICATE": "b",
        "PEMA_CLIENT_KEY": "c",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    _, bound, _ = app.parse_args(["info"])
    connection = ConnectionSettings(api_key="-k", ca=Path("a"), client_certificate=Path("b"), client_key=Path("c"))
    assert bound.arguments == {"server": "http://here", "connection": connection}
    _, bound, _ = app.parse_args(["info", "--api-key", "other", "--retry-for", "0"])
    assert (bound.arguments["connection"].api_key, bound.arguments["connection"].retry_for) == ("other", 0.0)
    assert "-k" not in repr(connection)


def test_settings_are_checked_in_python_too() -> None:
    with pytest.raises(InvalidRequest, match=r"rank is 0\. It must be ≥ 1\."):
        TrainingSettings(rank=0)
    with pytest.raises(InvalidRequest, match="dropout is nan"):
        TrainingSettings(dropout=float("nan"))
    with pytest.raises(InvalidRequest, match=r"rank is 2\.5\. It must be an integer\."):
        TrainingSettings(rank=2.5)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=r"timeout is '5'\. It must be a number\."):
        ConnectionSettings(timeout="5")  # type: ignore[arg-type]
    assert TrainingSettings(rank=np.int64(3), dropout=np.float32(0)).rank == 3  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="does not vary pairing"):
        Grid(varied={"pairing": ("aligned",)})


def test_every_setting_says_what_it_is() -> None:
    for setting in declared_settings(TrainingSettings):
        assert setting.sentence.endswith(".")
        assert setting.sentence[0].isupper()
    assert set(varied_names(TrainingSettings)) <= {each.name for each in declared_settings(TrainingSettings)}

"""Old names of flags, variables and subcommands: each works for one version, and a warning names the new one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from plm_owner_server.cli import main
from plm_owner_server.cli.old_names import RENAMED_FLAGS, RENAMED_SUBCOMMANDS, with_current_names
from plm_owner_server.settings import ServerSettings
from plm_owner_server.tenants.store import TenantStore
from protocol.errors import InvalidRequest


@pytest.fixture(autouse=True)
def _nothing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No `.env` and no variables of the developer, and none that outlive a test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if "PEMA_" not in name})


def variable(flag: str) -> str:
    return f"PEMA_{flag.removeprefix('--').replace('-', '_').upper()}"


def setting(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


@pytest.mark.parametrize(("old", "new"), RENAMED_FLAGS.items())
def test_an_old_flag_works_and_warns(old: str, new: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([old, "77"], [f"{old}=77"]):
        assert with_current_names(["serve", *arguments]) == ["serve", *(a.replace(old, new) for a in arguments)]
        assert capsys.readouterr().err == f"pema-server: {old} is now {new}; the old name works until version 0.3.\n"
    assert setting(new) in ServerSettings.model_fields
    assert setting(old) not in ServerSettings.model_fields


@pytest.mark.parametrize(("old", "new"), RENAMED_FLAGS.items())
@pytest.mark.parametrize("place", ["environment", ".env"])
def test_an_old_variable_works_and_warns(
    old: str, new: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if place == ".env":
        (tmp_path / ".env").write_text(f"{variable(old)}=77\n")
    else:
        os.environ[variable(old).lower()] = "77"
    assert with_current_names(["serve", "--port", "1"]) == ["serve", "--port", "1"]
    warning = f"pema-server: {variable(old)} is now {variable(new)}; the old name works until version 0.3.\n"
    assert capsys.readouterr().err == warning
    assert getattr(ServerSettings(), setting(new)) == 77


@pytest.mark.parametrize(("word", "flag"), [("false", "--no-pack-weights"), ("Yes", "--pack-weights")])
def test_an_old_switch_works_and_warns(word: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--pack-weights", word], [f"--pack-weights={word}"]):
        assert with_current_names(["serve", *arguments, "--port", "1"]) == ["serve", flag, "--port", "1"]
        warning = f"pema-server: --pack-weights {word} is now {flag}; the old name works until version 0.3.\n"
        assert capsys.readouterr().err == warning
    for arguments in (["--pack-weights"], ["--pack-weights", "--port", "1"], ["--no-pack-weights"]):
        assert with_current_names(["serve", *arguments]) == ["serve", *arguments]
    assert capsys.readouterr().err == ""


def test_the_new_name_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".env").write_text("PEMA_DRAIN_TIMEOUT=5\n")
    os.environ["PEMA_DRAIN_SECONDS"] = "6"
    with_current_names(["serve"])
    assert "PEMA_DRAIN_TIMEOUT" in capsys.readouterr().err
    assert ServerSettings().drain_timeout == 5


def test_current_names_and_other_commands_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    os.environ["PEMA_DRAIN_SECONDS"] = "6"  # says nothing to commands that do not serve
    for arguments in ([], ["--help"], ["tenants"], ["tenants", "usage", "limit"], ["tenants", "add", "--transfer-s"]):
        assert with_current_names(arguments) == arguments
    assert capsys.readouterr().err == ""


def test_an_old_subcommand_works_and_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = TenantStore(f"sqlite:///{tmp_path}/owner.db")
    store.add("acme")
    options = {"limit": ["--head-rows", "7"], "disclose": ["--head-policy", "none"]}
    for old, new in RENAMED_SUBCOMMANDS.items():
        command = ["pema-server", "tenants", old, "acme", *options[old], "--store", f"sqlite:///{tmp_path}/owner.db"]
        monkeypatch.setattr(sys, "argv", command)
        main()
        assert f"tenants {old} is now tenants {new};" in capsys.readouterr().err
    (acme,) = store.all()
    assert acme.quotas.head_rows == 7
    assert acme.disclosure.head_policy == "none"


@pytest.mark.parametrize("arguments", [["--api-key", "a key for all"], ["--api-key=a key for all"]])
def test_the_key_for_all_is_gone(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="--api-key was removed"):
        with_current_names(["serve", *arguments])
    monkeypatch.setattr(sys, "argv", ["pema-server", "serve", *arguments])
    with pytest.raises(SystemExit, match="pema-server tenants add NAME"):
        main()

"""`pema-client gateway`: names of adapters, and lines of errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from data_owner_client.cli import run
from data_owner_client.cli.gateway import adapter_folders, public_part
from plm_owner_server.tenants.api_keys import Key
from protocol.errors import InvalidData


def test_adapters_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert adapter_folders(["formal=runs/a", "runs/legal", "./runs/x=1", "key=a=b"]) == {
        "formal": Path("runs/a"),
        "legal": Path("runs/legal"),
        "x=1": Path("./runs/x=1"),
        "key": Path("a=b"),
    }
    assert adapter_folders(["."]) == {tmp_path.name: Path()}


@pytest.mark.parametrize("values", [["=a"], ["a="], ["a=x", "a=y"], ["runs/a", "other/a"], ["/"]])
def test_names_are_needed_once(values: list[str]) -> None:
    with pytest.raises(InvalidData) as caught:
        adapter_folders(values)
    assert "NAME=FOLDER" in caught.value.hint


def test_a_key_is_demanded_before_any_work(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEMA_GATEWAY_KEY", raising=False)
    assert run(["gateway", "--host", "0.0.0.0"]) != 0  # noqa: S104
    (line,) = capsys.readouterr().err.splitlines()
    assert "PEMA_GATEWAY_KEY" in line


def test_a_missing_package_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("run", "app"):
        monkeypatch.delitem(sys.modules, f"data_owner_client.gateway.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert run(["gateway"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "fastapi" in line
    assert "[client,gateway]" in line


@pytest.mark.parametrize("secret", ["abc", "_a_b_", "a_b-c"])
def test_nothing_of_a_secret_is_shown(secret: str) -> None:
    key = Key("0123456789abcdef", secret)
    assert public_part(str(key)) == "pema_0123456789abcdef_…"
    assert public_part(secret) == "that you gave"

"""`pema-server --help` and its kin speak of files and seconds, not of Python types."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version

import pytest
from pydantic import BaseModel

from plm_owner_server.cli import main
from plm_owner_server.settings import ServerSettings

COMMANDS = ["", "serve", "tenants"]
COMMANDS += [f"tenants {name}" for name in ("add", "list", "set-quotas", "usage", "rotate-key", "set-disclosure")]
COMMANDS += ["tenants disable", "tenants enable"]
INTERNALS = (
    *(r"\b(str|int|float|bool|dict|list)\b", "Path", "SecretStr", r"\bAny\b(?! but)", "Undefined"),
    *("None", "True", "False", "default factory", "lambda", ",none}", r"default: none\b"),
)


def output(arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Standard output of the command, with line breaks as spaces."""
    monkeypatch.setattr(sys, "argv", ["pema-server", *arguments.split()])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_no_python(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = output(f"{command} --help", monkeypatch, capsys)
    text = text.replace("tenants list", "").replace("list,set-quotas", "").replace("{full,candidate,none}", "")
    if command == "tenants":
        text = text.replace("list List", "")
    assert [found for pattern in INTERNALS if (found := re.findall(pattern, text))] == []


def test_every_flag_has_a_group_and_a_default_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = output("serve --help", monkeypatch, capsys)
    titles = {base.model_config["title"] for base in ServerSettings.__bases__ if issubclass(base, BaseModel)}
    assert titles > {"Model", "Engine", "Network", "TLS", "Tenants", "Operations"}
    assert [text.index(f"{title}: --") for title in titles]
    assert "usage: pema-server serve [options]" in text
    options = text.partition("options: ")[2].partition(" Model: ")[0]
    assert options == "-h, --help show this help message and exit"
    for name in ServerSettings.model_fields:
        assert f" --{name.replace('_', '-')}" in text
    for words in (
        "--grpc-port PORT TCP port of gRPC; 0 takes a free one. By default the one after --port, where clients look "
        "for it. --max",
        "--pack-weights, --no-pack-weights CPU",
        "twice the memory. (default: yes)",
        "--engine {transformers,vllm}",
        "--tls-key FILE",
        "--cache-dir FOLDER",
        "--transfer-timeout SECONDS",
        "disconnected. (default: 30)",
    ):
        assert words in text


def test_subcommands_are_described(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = output("--help", monkeypatch, capsys)
    assert "serve Load a model and serve it over REST and gRPC. tenants Manage the tenants of this server" in text
    text = output("tenants --help", monkeypatch, capsys)
    assert "disable Refuse a tenant's calls. enable Admit a disabled tenant again" in text
    assert "[--csv] [--json]" in output("tenants usage --help", monkeypatch, capsys)


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert output("--version", monkeypatch, capsys) == version("pema")

"""Environment variables: those of Kubernetes, space around values, misspelt names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from plm_owner_server.cli import main, server_process
from plm_owner_server.cli.environment import variable_warnings
from plm_owner_server.settings import ServerSettings, StoreSettings

ROOT = Path(__file__).parents[3]
COMPOSE = [ROOT / "docker-compose.yml", *(ROOT / "docker").glob("*.yml")]
# As Kubernetes sets them in a pod, for Services named pema, pema-grpc, pema-metrics and pema-server.
KUBERNETES = {
    "PEMA_SERVICE_HOST": "10.0.0.7",
    "PEMA_SERVICE_PORT": "8000",
    "PEMA_SERVICE_PORT_REST": "8000",
    "PEMA_PORT": "tcp://10.0.0.7:8000",
    "PEMA_PORT_8000_TCP": "tcp://10.0.0.7:8000",
    "PEMA_PORT_8000_TCP_PROTO": "tcp",
    "PEMA_PORT_8000_TCP_PORT": "8000",
    "PEMA_PORT_8000_TCP_ADDR": "10.0.0.7",
    "PEMA_GRPC_PORT": "tcp://10.0.0.8:8001",
    "PEMA_METRICS_PORT": "udp://[fd00::7]:9100",
    "PEMA_SERVER_PORT": "tcp://10.0.0.9:8000",
    "PEMA_SERVER_SERVICE_HOST": "10.0.0.9",
}


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment without settings, in a folder without `.env`."""
    monkeypatch.chdir(tmp_path)
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PEMA_")}
    monkeypatch.setattr(os, "environ", variables)
    return variables


def test_addresses_of_services_are_no_ports(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PEMA_METRICS_PORT=9101\n")
    environment |= KUBERNETES
    settings = ServerSettings()
    assert (settings.port, settings.grpc_port, settings.metrics_port) == (8000, None, 9101)
    assert ServerSettings(port=9000).port == 9000


def test_each_ignored_address_is_reported(environment: dict[str, str]) -> None:
    environment |= KUBERNETES
    lines = list(variable_warnings(environment))
    assert [line.partition("=")[0] for line in lines] == ["PEMA_PORT", "PEMA_GRPC_PORT", "PEMA_METRICS_PORT"]
    for line, flag in zip(lines, ("--port", "--grpc-port", "--metrics-port"), strict=True):
        assert f"Say {flag} " in line
        assert "enableServiceLinks: false" in line


@pytest.mark.parametrize("value", ["tcp://10.0.0.7:8000", "80 80", "port", "-1"])
def test_a_flag_with_another_value_is_a_mistake(value: str) -> None:
    with pytest.raises(ValidationError):
        ServerSettings(port=value)


def test_a_tilde_is_the_home_folder(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a unit file of systemd, which leaves it as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    environment |= {"PEMA_CACHE_DIR": "~/models", "PEMA_TLS_CERTIFICATE": "~/server.pem"}
    settings = ServerSettings(tls_key="~nobody-here/key")
    assert (settings.cache_dir, settings.tls_certificate) == (tmp_path / "models", tmp_path / "server.pem")
    assert settings.tls_key == Path("~nobody-here/key")


@pytest.mark.parametrize("space", ["\n", " ", "\r\n", "\t"])
def test_space_around_a_value_does_not_count(space: str, environment: dict[str, str], tmp_path: Path) -> None:
    """As in values from mounted secrets, which end in a newline."""
    secret, url = "0123456789abcdef" * 4, "postgresql+psycopg://owner@db/pema"
    environment |= {
        "PEMA_MASTER_SECRET": secret + space,
        "PEMA_STORE": space + url + space,
        "PEMA_PORT": f"9000{space}",
        "PEMA_MODEL": f"smollm2-135m{space}",
        "PEMA_TLS_CERTIFICATE": f"{tmp_path}/server.pem{space}",
        "PEMA_TLS_KEY": f"{tmp_path}/server.key{space}",
    }
    settings = ServerSettings()
    assert settings.master_secret is not None
    assert settings.master_secret.get_secret_value() == secret
    assert (settings.store, settings.port, settings.model) == (url, 9000, "smollm2-135m")
    assert (settings.tls_certificate, settings.tls_key) == (tmp_path / "server.pem", tmp_path / "server.key")
    assert StoreSettings().store == url


@pytest.mark.parametrize(
    ("name", "similar"),
    [("PEMA_MAX_SEQENCES", "PEMA_MAX_SEQUENCES"), ("PEMA_ALOWED_HOSTS", "PEMA_ALLOWED_HOSTS")],
)
def test_a_misspelt_name_is_reported(name: str, similar: str) -> None:
    (line,) = variable_warnings({name: "1"})
    assert name in line
    assert f"did you mean {similar}?" in line


def test_names_of_others_are_not_reported() -> None:
    """Names of the client, the compose files, the servers' processes and tests, and old names, are known."""
    of_compose = set(re.findall(r"\bPEMA_[A-Z_]+\b", "".join(path.read_text() for path in COMPOSE)))
    assert len(of_compose) > 20
    of_client = {"PEMA_SERVER", "PEMA_API_KEY", "PEMA_CA", "PEMA_CLIENT_CERTIFICATE", "PEMA_CLIENT_KEY"}
    of_processes = {"PEMA_VLLM_ENDS_WITH", "PEMA_TEST_PROFILE", "PEMA_PADDING_TOKENS"}
    assert list(variable_warnings(dict.fromkeys(of_compose | of_client | of_processes, "1"))) == []


def test_a_pod_with_services_of_our_names_starts(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[ServerSettings] = []
    monkeypatch.setattr(server_process, "serve", started.append)
    monkeypatch.setattr(sys, "argv", ["pema-server", "serve", "--host", "127.0.0.2"])
    environment |= KUBERNETES | {"PEMA_MODEL": "smollm2-135m\n"}
    main()
    assert [(s.host, s.port, s.grpc_port, s.model) for s in started] == [("127.0.0.2", 8000, None, "smollm2-135m")]
    assert "PEMA_PORT=tcp://10.0.0.7:8000 is the address of a Service" in capsys.readouterr().err


@pytest.mark.parametrize(("hosts", "expected"), [("a.example, *.b.example", ("a.example", "*.b.example")), ("", ())])
def test_hosts_are_divided_by_commas(hosts: str, expected: tuple[str, ...], environment: dict[str, str]) -> None:
    environment["PEMA_ALLOWED_HOSTS"] = hosts
    assert ServerSettings().allowed_hosts == expected


@pytest.mark.parametrize(
    "host", ["http://b.example", ".b.example", "b*.example", "müller.example", '"b.example"', "b.example;c.example"]
)
def test_rules_that_match_no_host_are_refused(host: str, environment: dict[str, str]) -> None:
    environment["PEMA_ALLOWED_HOSTS"] = f"a.example,{host}"
    with pytest.raises(ValidationError, match=f"{re.escape(host)} is no host"):
        ServerSettings()


@pytest.mark.parametrize(
    "host", ["*", "*.b.example", "b.example.:8000", "10.0.0.7", "10.0.0.7:80", "fd00::7", "[::1]:1"]
)
def test_rules_for_hosts_are_taken(host: str, environment: dict[str, str]) -> None:
    environment["PEMA_ALLOWED_HOSTS"] = host
    assert ServerSettings().allowed_hosts == (host,)


@pytest.mark.parametrize("setting", ["host", "metrics_host"])
def test_an_address_to_listen_on_has_no_more_than_the_host(setting: str, environment: dict[str, str]) -> None:
    for value, read in {"[::1]": "::1", "::": "::", "0.0.0.0": "0.0.0.0", "localhost": "localhost"}.items():  # noqa: S104
        environment[f"PEMA_{setting.upper()}"] = value
        assert getattr(ServerSettings(), setting) == read
    for value in ("http://127.0.0.1", "127.0.0.1:8000", "*", "my host"):
        environment[f"PEMA_{setting.upper()}"] = value
        with pytest.raises(ValidationError, match="is no address"):
            ServerSettings()


@pytest.mark.parametrize("value", ["", " ", "\n"])
def test_an_empty_variable_is_not_set(value: str, environment: dict[str, str], tmp_path: Path) -> None:
    """As compose files set it, for what the owner has not set."""
    (tmp_path / ".env").write_text(f"PEMA_REVISION={value}\nPEMA_DTYPE=\nPEMA_METRICS_PORT\n")
    names = [f"PEMA_{name.upper()}" for name in ServerSettings.model_fields]
    expected = ServerSettings(_env_file=None)
    environment |= dict.fromkeys(names, value)
    assert ServerSettings() == expected


@pytest.mark.parametrize("value", ['"0123456789"', "'0123456789'", ' "0123456789"\n'])
def test_quotes_around_a_value_are_reported(value: str) -> None:
    (line,) = variable_warnings({"PEMA_MASTER_SECRET": value})
    assert "PEMA_MASTER_SECRET" in line
    assert "quotes" in line
    assert "0123" not in line


@pytest.mark.parametrize("value", ["tcp://10.0.0.7:8000", "1\n"])
def test_the_check_of_a_container_reads_ports_alike(value: str) -> None:
    """It reports that nothing answers there, and not a traceback."""
    process = subprocess.run(
        [sys.executable, ROOT / "docker/ready.py"],
        env={"PEMA_PORT": value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode in (0, 1)
    assert "Traceback" not in process.stderr

"""The compose files, without a Docker engine: hardening, reachable ports, monitoring."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from data_owner_client.cli import app
from data_owner_client.gateway.server_process import DRAIN_SECONDS
from harness.tiny_models import TinyModels
from plm_owner_server.operations.metrics import Metrics
from plm_owner_server.operations.serving_state import ServingState
from plm_owner_server.settings import ServerSettings
from tests import support

ROOT = Path(__file__).parents[3]
OVERLAYS = sorted((ROOT / "docker").glob("compose.*.yml"))
FILES = [ROOT / "docker-compose.yml", *OVERLAYS]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
# Settings of the containers, not of the server.
NO_SETTINGS = {"PEMA_FIRST_TENANT"}
# Of the gateway, which is the data owner's.
OF_GATEWAY = {
    "PEMA_SERVER",
    "PEMA_API_KEY",
    "PEMA_GATEWAY_KEY",
    "PEMA_GATEWAY_PORT",
    "PEMA_ADAPTER",
    "PEMA_ADAPTER_NAME",
}
METRIC = re.compile(r"\b(?:pema|process)_\w+")


def with_defaults(text: str) -> str:
    """A compose file's text as it is where nothing is set in the environment."""
    return re.sub(
        r"\$\{\w+(?::?(?:-([^}]*)|(\?)[^}]*))?\}", lambda match: "/given" if match[2] else match[1] or "", text
    )


def services(path: Path) -> dict[str, dict[str, Any]]:
    content: dict[str, dict[str, Any]] = yaml.safe_load(with_defaults(path.read_text(encoding="utf-8")))
    return content["services"]


def all_services() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in FILES:
        for name, service in services(path).items():
            yield f"{path.name}: {name}", service


# What an overlay changes of a service is hardened where the service is made.
MADE = [
    pytest.param(service, id=label)
    for label, service in all_services()
    if "cap_drop" in service or ("image" in service and label.split(": ")[1] not in services(FILES[0]))
]


def test_there_is_an_overlay_for_each_need() -> None:
    names = {path.name.split(".")[1] for path in OVERLAYS}
    assert names >= {"gpu", "vllm", "tls", "postgres", "replicas", "replicas-tls", "monitoring", "gateway"}


@pytest.mark.parametrize("service", MADE)
def test_every_service_is_hardened_alike(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "/tmp" in service["tmpfs"]  # noqa: S108
    assert not service.get("privileged")
    assert service.get("network_mode") != "host"


@pytest.mark.parametrize("service", MADE)
def test_no_service_is_root(service: dict[str, Any]) -> None:
    if "build" not in service:
        assert not service["user"].startswith("0")
        return
    dockerfile = (ROOT / service["build"]["dockerfile"]).read_text(encoding="utf-8")
    users = re.findall(r"^USER (\S+)$", dockerfile, re.MULTILINE)
    assert users
    assert users[-1] not in {"root", "0"}


def test_every_port_is_on_loopback_unless_told() -> None:
    ports = [(label, port) for label, service in all_services() for port in service.get("ports", [])]
    assert len(ports) >= 6
    assert [port for port in ports if not port[1].startswith("127.0.0.1:")] == []


def test_images_of_others_are_pinned() -> None:
    for label, service in all_services():
        if "build" not in service and "image" in service:
            assert re.fullmatch(r"\S+:v?\d+\.\d+\S*", service["image"]), label


def test_images_of_ours_begin_alike() -> None:
    for path in DOCKERFILES:
        assert "ARG BASE=python:3.11-slim-bookworm\n" in path.read_text(encoding="utf-8"), path.name
    heads = [
        re.search(r"^# The requirements.*(?=^# Only the code)", path.read_text(encoding="utf-8"), re.M | re.S)
        for path in DOCKERFILES
        if path.name in {"server.Dockerfile", "client.Dockerfile"}
    ]
    first, second = (head and head[0] for head in heads)
    assert first
    assert first == second


def test_what_is_set_is_a_setting() -> None:
    known = {f"PEMA_{name.upper()}" for name in ServerSettings.model_fields}
    for label, service in all_services():
        for name in service.get("environment", {}):
            assert not name.startswith("PEMA_") or name in known | NO_SETTINGS | OF_GATEWAY, (label, name)


def test_calls_may_end_before_a_container_is_killed() -> None:
    server = services(FILES[0])["server"]
    grace_s = int(server["stop_grace_period"].removesuffix("s"))
    assert grace_s > server["environment"]["PEMA_DRAIN_TIMEOUT"] + 5


def test_answers_may_end_before_the_gateway_is_killed() -> None:
    grace_s = int(services(ROOT / "docker/compose.gateway.yml")["gateway"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > DRAIN_SECONDS + 5


def test_the_gateway_is_started_with_options_that_it_has() -> None:
    (script,) = services(ROOT / "docker/compose.gateway.yml")["gateway"]["command"]
    words = script.replace("$$", "$").partition("exec pema-client ")[2].replace('"$PEMA_GATEWAY_PORT"', "8010").split()
    given = ["--adapter", "adapter=/adapter", "--gateway-key", "a-key"]
    command, bound, _ = app.parse_args([*words[:-1], *given], exit_on_error=False, print_error=False)
    assert command.__name__ == "gateway"
    assert bound.arguments["settings"].allowed_hosts == ("gateway",)


def test_volumes_are_declared() -> None:
    for path in FILES:
        content = yaml.safe_load(with_defaults(path.read_text(encoding="utf-8")))
        used = {v.split(":")[0] for s in content["services"].values() for v in s.get("volumes", [])}
        named = {volume for volume in used if volume and not volume.startswith((".", "/"))}
        assert named == set(content.get("volumes", {})), path.name


def test_the_dashboard_shows_metrics_that_there_are(tiny_models: TinyModels) -> None:
    registry: CollectorRegistry = Metrics(ServingState(support.make_service(tiny_models["llama"]))).registry
    there = {"pema_gpu_memory_bytes"}  # of CUDA alone
    for family in registry.collect():
        if family.type == "counter":
            there.add(f"{family.name}_total")
        elif family.type == "histogram":
            there.add(f"{family.name}_bucket")
        else:
            there.add(family.name)
    panels = json.loads((ROOT / "docker/monitoring/pema.json").read_text(encoding="utf-8"))["panels"]
    shown = {name for panel in panels for target in panel["targets"] for name in METRIC.findall(target["expr"])}
    assert shown - there == set()
    assert {name for name in there if name.startswith("pema_")} - shown == set()


def test_prometheus_asks_where_servers_tell() -> None:
    environment = services(FILES[0])["server"]["environment"]
    content = yaml.safe_load((ROOT / "docker/monitoring/prometheus.yml").read_text(encoding="utf-8"))
    (found,) = content["scrape_configs"][0]["dns_sd_configs"]
    assert (found["names"], found["port"]) == (["server"], environment["PEMA_METRICS_PORT"])

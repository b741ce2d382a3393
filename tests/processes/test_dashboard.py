"""The dashboard's queries, asked of a Prometheus that reads two servers, as docker/compose.monitoring.yml puts them up.

Prometheus is that of the machine's packages (`apt-get install prometheus`), or the program that PATH has first.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml

from data_owner_client.plm.connection.base import Connection
from data_owner_client.plm.connection.open import open_connection
from harness.processes import Ports, free_port, free_ports, running_server
from harness.tiny_models import TinyModels
from protocol.messages import DecodeRequest, EncodeRequest, HeadRequest
from tests import support

PROGRAM = shutil.which("prometheus")
pytestmark = [
    pytest.mark.unguarded("the metrics of servers of its own"),
    pytest.mark.skipif(PROGRAM is None, reason="Prometheus is not installed"),
]
MONITORING = Path(__file__).parents[2] / "docker" / "monitoring"
SCRAPE_SECONDS = 1
# As Grafana computes it: four scrapes.
RATE_INTERVAL = f"{4 * SCRAPE_SECONDS}s"
WITHIN_SECONDS = 90
PANELS = json.loads((MONITORING / "pema.json").read_text(encoding="utf-8"))["panels"]
# There is no such metric without CUDA.
OF_GPUS = {"GPU memory"}


@dataclass
class Prometheus:
    """A running Prometheus.

    Attributes:
        url: of its HTTP interface.
    """

    url: str

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready").is_success
        except httpx.TransportError:
            return False

    def ask(self, query: str) -> list[float]:
        """The values that a query has now, one for each series."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": query}).raise_for_status().json()
        assert answer["status"] == "success"
        return [float(series["value"][1]) for series in answer["data"]["result"]]


@contextmanager
def prometheus(folder: Path, targets: list[str]) -> Iterator[Prometheus]:
    """Prometheus with the configuration of the compose overlay, except for the names of servers and the interval."""
    content: dict[str, Any] = yaml.safe_load((MONITORING / "prometheus.yml").read_text(encoding="utf-8"))
    content["global"]["scrape_interval"] = f"{SCRAPE_SECONDS}s"
    (job,) = content["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": targets}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(content), encoding="utf-8")
    address = f"127.0.0.1:{free_port()}"
    flags = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command = [str(PROGRAM), *flags, f"--web.listen-address={address}"]
    with (folder / "prometheus.log").open("wb") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            running = Prometheus(f"http://{address}")
            support.until(running.is_ready, within_s=60)
            yield running
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def watched(
    tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Prometheus, list[Connection]]]:
    """Prometheus, and a client of each of the two servers that it reads: one over REST, one over gRPC."""
    folder = tmp_path_factory.mktemp("monitoring")
    metrics = free_ports(2)
    clients = []
    with ExitStack() as stack:
        for scheme, port in zip(("http", "grpc"), metrics, strict=True):
            ports = Ports(*free_ports(2))
            flags = ["--model", str(tiny_models["llama"]), "--metrics-port", str(port)]
            log, rest = folder / f"{scheme}.log", f"http://127.0.0.1:{ports.rest}"
            stack.enter_context(running_server(log, ports, *flags, url=rest))
            url = {"http": rest, "grpc": f"grpc://127.0.0.1:{ports.grpc}"}[scheme]
            clients.append(stack.enter_context(closing(open_connection(url))))
        yield stack.enter_context(prometheus(folder, [f"127.0.0.1:{port}" for port in metrics])), clients


def call_each_kind(client: Connection) -> None:
    client.encode(EncodeRequest(token_ids=[[5, 6, 7], [8, 9]], from_position=[0, 0]))
    client.decode(DecodeRequest(token_ids=[list(range(3, 60))], look_ahead=[4]))
    client.lm_head(HeadRequest(start=10, stop=30))


def test_every_panel_shows_a_number_under_load(watched: tuple[Prometheus, list[Connection]]) -> None:
    prometheus, clients = watched
    queries = {panel["title"]: target["expr"] for panel in PANELS for target in panel["targets"]}
    assert len(queries) == len(PANELS)
    calls = 0
    answers: dict[str, list[float]] = {}

    def all_answer() -> bool:
        nonlocal calls
        for client in clients:
            call_each_kind(client)
        calls += 1
        for title, query in queries.items():
            answers[title] = prometheus.ask(query.replace("$__rate_interval", RATE_INTERVAL))
        shown = {title for title, values in answers.items() if any(map(math.isfinite, values))}
        return shown >= queries.keys() - (set() if torch.cuda.is_available() else OF_GPUS)

    support.until(all_answer, within_s=WITHIN_SECONDS)
    assert answers["Ready replicas"] == [2]
    assert len(answers["Process memory"]) == len(answers["Prefix cache"]) == 2
    assert all(0 < fill <= 1 for fill in answers["Batch fill: tokens among padded tokens"] if math.isfinite(fill))

    # The counters against the calls that were made here.
    def all_counted() -> bool:
        return prometheus.ask('sum by (call) (pema_requests_total{outcome="ok", call!="head"})') == [2 * calls] * 2

    support.until(all_counted, within_s=WITHIN_SECONDS)
    assert prometheus.ask('sum(pema_tokens_in_total{call="encode"})') == [2 * calls * 5]
    assert prometheus.ask('sum(pema_rows_out_total{call="head"})') == [2 * calls * 20]


def test_the_autoscaler_has_a_number_for_each_server(watched: tuple[Prometheus, list[Connection]]) -> None:
    prometheus, _ = watched
    support.until(lambda: len(prometheus.ask('pema_queue_requests{state="waiting"}')) == 2, within_s=WITHIN_SECONDS)

"""Prometheus metrics of a server, on a port of their own.

Calls are counted when they are over. The state of the queue, the engine and the memory is read at each scrape. Labels
have few values: no client, no tenant, no request.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import torch
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, make_wsgi_app, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from plm_owner_server.engines.interface import EngineStats
from plm_owner_server.operations.call_log import PROBE, CallRecord
from plm_owner_server.operations.serving_state import ServingState
from plm_owner_server.service.scheduler import Scheduler
from protocol.errors import PROBLEM_JSON, PemaError, to_problem

# Seconds: from a decode step of a small model to the longest request.
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60)


class Metrics:
    """The metrics of one server.

    Args:
        state: state of the server.

    Attributes:
        registry: holds these metrics alone, so that a process may have several servers.
    """

    def __init__(self, state: ServingState) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(_StateCollector(state))
        self._requests = Counter(
            "pema_requests",
            "Calls that are over, by outcome: ok, client_disconnected, or the code of the error.",
            ["call", "transport", "outcome"],
            registry=self.registry,
        )
        self._tokens = Counter("pema_tokens_in", "Tokens of sequences sent.", ["call"], registry=self.registry)
        self._rows = Counter("pema_rows_out", "Rows given out.", ["call"], registry=self.registry)
        self._seconds = Histogram(
            "pema_call_seconds",
            "Where the time of a call went: waiting for the model, its work, all else.",
            ["call", "part"],
            buckets=_BUCKETS,
            registry=self.registry,
        )

    def observe(self, call: CallRecord) -> None:
        """Count a call that is over."""
        if call.name == PROBE:
            return
        self._requests.labels(call.name, call.transport, call.outcome).inc()
        self._tokens.labels(call.name).inc(call.usage.tokens)
        self._rows.labels(call.name).inc(call.usage.rows)
        for part, seconds in call.parts.items():
            self._seconds.labels(call.name, part).observe(seconds)

    @contextmanager
    def served(self, host: str, port: int, *, check_host: Callable[[str | None, str | None], None]) -> Iterator[int]:
        """Serve the metrics over HTTP while the body runs; yields the port.

        Args:
            host: address to listen on.
            port: 0 takes a free one.
            check_host: raises PemaError for values of the headers `Host` and `Origin` that are not answered.

        Raises:
            PemaError: the server cannot listen there.
        """
        try:
            server, thread = start_http_server(port, host, self.registry)
            server.set_app(_with_checked_hosts(make_wsgi_app(self.registry), check_host))
        except OSError as error:
            raise PemaError(
                f"Metrics cannot be served on port {port} of {host}: {error}.", hint="Choose another --metrics-port."
            ) from error
        try:
            yield server.server_port
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _with_checked_hosts(app: WSGIApplication, check_host: Callable[[str | None, str | None], None]) -> WSGIApplication:
    """The application, with a problem document for requests that name another host. HEAD is GET without the body."""

    def checked(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            check_host(environ.get("HTTP_HOST"), environ.get("HTTP_ORIGIN"))
        except PemaError as error:
            start_response(f"{error.http_status} {error.code}", [("Content-Type", PROBLEM_JSON)])
            return [json.dumps(to_problem(error)).encode()]
        if environ["REQUEST_METHOD"] != "HEAD":
            return app(environ, start_response)
        app(environ | {"REQUEST_METHOD": "GET"}, start_response)
        return []

    return checked


class _StateCollector(Collector):
    """Collects the state of queue, engine and GPUs at each scrape."""

    def __init__(self, state: ServingState) -> None:
        self._state = state

    def describe(self) -> Iterable[Metric]:
        return []  # else the registry would collect once, for the names alone

    def collect(self) -> Iterator[Metric]:
        service = self._state.service
        yield GaugeMetricFamily("pema_ready", "1 if calls are answered.", value=float(self._state.is_ready))
        if service is not None:
            yield from _queue(service.scheduler)
            yield from _engine(service.engine.stats)
        if torch.cuda.is_available():
            yield from _gpus()


def _queue(scheduler: Scheduler) -> Iterator[Metric]:
    load = scheduler.load()
    requests = GaugeMetricFamily("pema_queue_requests", "Requests before the model.", labels=["state"])
    tokens = GaugeMetricFamily("pema_queue_tokens", "Their tokens, with those to draft.", labels=["state"])
    requests.add_metric(["waiting"], load.waiting_requests)
    requests.add_metric(["running"], load.running_requests)
    tokens.add_metric(["waiting"], load.waiting_tokens)
    tokens.add_metric(["running"], load.running_tokens)
    yield from (requests, tokens)


def _engine(stats: EngineStats) -> Iterator[Metric]:
    passes = CounterMetricFamily("pema_passes", "Forward passes.", labels=["kind"])
    tokens = CounterMetricFamily("pema_pass_tokens", "Tokens run in them.", labels=["kind"])
    padded = CounterMetricFamily("pema_pass_padded_tokens", "Tokens run in them, padding included.", labels=["kind"])
    for kind, of_kind in stats.passes.items():
        passes.add_metric([kind], of_kind.count)
        tokens.add_metric([kind], of_kind.tokens)
        padded.add_metric([kind], of_kind.padded_tokens)
    yield from (passes, tokens, padded)
    yield CounterMetricFamily(
        "pema_prefix_cache_hit_tokens", "Tokens not run, as their states were cached.", value=stats.cached_tokens
    )
    yield GaugeMetricFamily("pema_prefix_cache_bytes", "Size of the cached states.", value=stats.cached_bytes)


def _gpus() -> Iterator[Metric]:
    memory = GaugeMetricFamily("pema_gpu_memory_bytes", "Memory of a GPU.", labels=["device", "kind"])
    for device in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(device)
        memory.add_metric([str(device), "free"], free)
        memory.add_metric([str(device), "total"], total)
        memory.add_metric([str(device), "allocated"], torch.cuda.memory_allocated(device))
        memory.add_metric([str(device), "reserved"], torch.cuda.memory_reserved(device))
    yield memory

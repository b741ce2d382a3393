"""Prometheus metrics of the gateway.

Labels are routes, statuses, calls of the protocol and configured names of models: nothing that a request chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from data_owner_client.plm.connection.base import Attempt

OTHER = "other"
"""Label of everything without a name of its own."""
# Seconds: from one round trip to a server nearby to an answer of a busy one.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60)


class Metrics:
    """The metrics of one gateway.

    Args:
        model_names: names of the served models at this time; other names are counted as `other`.

    Attributes:
        registry: holds these metrics alone, so that a process may have several gateways.
    """

    def __init__(self, model_names: Callable[[], Collection[str]] = tuple) -> None:
        self._model_names = model_names
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "pema_gateway_requests",
            "Requests that are over, by route and HTTP status.",
            ["route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "pema_gateway_request_seconds",
            "Time from a request's head to the end of its answer.",
            ["route"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._first_token = Histogram(
            "pema_gateway_first_token_seconds",
            "Time from a request to the first token of its answer.",
            ["model"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._tokens = Counter(
            "pema_gateway_tokens",
            "Tokens of prompts (shown to the owner) and of answers.",
            ["model", "kind"],
            registry=self.registry,
        )
        self._round_trips = Counter(
            "pema_gateway_round_trips",
            "Calls to the PLM owner's server, by outcome: answered or refused.",
            ["call", "outcome"],
            registry=self.registry,
        )
        self._waiting = Gauge(
            "pema_gateway_waiting_answers", "Answers that wait for a place in a round.", registry=self.registry
        )
        self._active = Gauge("pema_gateway_active_answers", "Answers in the current round.", registry=self.registry)

    def watch(self, *, waiting: Callable[[], int], active: Callable[[], int]) -> None:
        """Read the load at each scrape.

        Args:
            waiting: number of answers that wait for a place in a round.
            active: number of answers in the current round.
        """
        self._waiting.set_function(waiting)
        self._active.set_function(active)

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Count a request that is over.

        Args:
            route: template of the route's path, or `other`.
            status: HTTP status of the answer.
            seconds: time from the request's head to the end of its answer.
        """
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def count_tokens(self, model: str, *, prompt: int, completion: int) -> None:
        """Count the tokens of a request that is over."""
        self._tokens.labels(self._model(model), "prompt").inc(prompt)
        self._tokens.labels(self._model(model), "completion").inc(completion)

    def observe_first_token(self, model: str, seconds: float) -> None:
        """Record the time from a request to the first token of its answer."""
        self._first_token.labels(self._model(model)).observe(seconds)

    def observe_attempt(self, attempt: Attempt) -> None:
        """Count a call to the owner; an observer of the PLM's connection."""
        self._round_trips.labels(attempt.call, "refused" if attempt.refused else "answered").inc()

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _model(self, name: str) -> str:
        return name if name in self._model_names() else OTHER

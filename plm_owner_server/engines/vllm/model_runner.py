"""Queries to a model that drafts and schedules by itself, such as vLLM, and checks of its results.

Such a model takes each text as one query, with all tokens that are drafted after it. It caches states of texts'
prefixes, but never of a requested position. Every result is compared with its query before it is used.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from plm_owner_server.engines.interface import EngineStats, PassKind
from protocol.errors import NotReady

log = logging.getLogger(__name__)

_PULSE_SECONDS = 1.0
_RETRY_AFTER_SECONDS = 1.0


@dataclass(frozen=True, eq=False)
class TextQuery:
    """A text, and the positions of it and of drafted tokens that are requested.

    Attributes:
        token_ids: token ids of the text.
        start: first requested position; all positions after it are requested, too.
        scored: whether log-sum-exp and top-1 are requested.
        look_ahead: largest number of tokens to draft after the text.
        stop_token_ids: tokens after which drafting ends.
        tenant: the tenant that asks; cached states are never shared between tenants.
    """

    token_ids: list[int]
    start: int
    scored: bool
    look_ahead: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    tenant: str = ""


@dataclass(frozen=True, eq=False)
class TextRows:
    """The model's result for one text, from its first requested position on. T positions.

    Attributes:
        hidden_T_D: inputs of the LM head, on the CPU.
        logsumexp_T: log Σ_v exp(logit_v), float32; undefined unless requested.
        top1_logit_T: largest logit, float32; undefined unless requested.
        top1_T: int64, the token of the largest logit; undefined unless requested.
        ran_token_ids: the token that was run at each position.
        drafted: tokens that the model chose after the text; the last of them was not run.
        cached_tokens: number of leading tokens that were not run because they were cached.
    """

    hidden_T_D: Tensor
    logsumexp_T: Tensor
    top1_logit_T: Tensor
    top1_T: Tensor
    ran_token_ids: list[int]
    drafted: list[int]
    cached_tokens: int

    def is_for(self, query: TextQuery) -> bool:
        """Return whether it has exactly the requested positions, of the tokens that the query and the drafts say."""
        expected = [*query.token_ids, *self.drafted[:-1]][query.start :]
        return (
            len(self.hidden_T_D) == len(expected)
            and self.ran_token_ids == expected
            and 1 <= len(self.drafted) <= query.look_ahead + 1
            and self.cached_tokens <= query.start
        )


class GeneratingModel(Protocol):
    """A model that takes any number of queries at the same time."""

    def submit(self, query: TextQuery) -> Future[TextRows]:
        """A result to come. Cancelling it ends the work on it."""

    def pulse(self) -> Future[Any]:
        """A result that comes once the model has ended its present pass."""

    def reset_cache(self) -> bool:
        """Remove all cached states. Return whether they could be removed."""

    def is_alive(self) -> bool:
        """Return whether the model can still work, without running it."""


class GenerationRunner:
    """Sends queries to a model, checks and counts the results, and removes cached states in time.

    Args:
        model: the model.
        prefix_cache_ttl: seconds after their computation at which all cached states are removed.
        clock: current time, in seconds.

    Attributes:
        stats: statistics of what was run; each text counts as one pass, as the model does not report its passes.
    """

    def __init__(
        self, model: GeneratingModel, *, prefix_cache_ttl: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._model = model
        self._prefix_cache_ttl = prefix_cache_ttl
        self._clock = clock
        self._cached_since: float | None = None  # time of the oldest cached states; None if there are none
        self._lock = threading.Lock()  # held while the cache is reset
        self._last_pulse = clock()
        self.stats = EngineStats()

    def submit(self, queries: Sequence[TextQuery]) -> list[Future[TextRows]]:
        """Results to come, in the order of the queries; `result` checks each."""
        with self._lock:
            self._reset_cache_if_due()
            self._cached_since = self._clock() if self._cached_since is None else self._cached_since
        return [self._model.submit(query) for query in queries]

    def result(self, query: TextQuery, future: Future[TextRows], kind: PassKind) -> TextRows:
        """The result of a query, once it is there.

        Raises:
            NotReady: rows are missing, or were computed of other tokens. The same call may succeed.
        """
        rows = future.result()
        if not rows.is_for(query):
            log.error("the model returned other rows than requested")
            raise NotReady(
                "The model returned other rows than requested.",
                hint="Try again; if this happens again, report it to the owner.",
                retry_after_s=_RETRY_AFTER_SECONDS,
            )
        ran = query.start + len(rows.ran_token_ids) - rows.cached_tokens
        self.stats.record(kind, ran, ran)
        self.stats.cached_tokens += rows.cached_tokens
        return rows

    def wait(self, futures: Sequence[Future[TextRows]], seconds: float) -> None:
        """Wait until one of these results is there, or for some time.

        About once a second this also waits for the model's present pass. So a call takes as long as a pass that hangs.
        """
        done, _ = wait(futures, seconds, FIRST_COMPLETED)
        if done or not futures or self._clock() - self._last_pulse < _PULSE_SECONDS:
            return
        pulse = self._model.pulse()
        while self._model.is_alive() and not wait([pulse, *futures], _PULSE_SECONDS, FIRST_COMPLETED).done:
            pass
        self._last_pulse = self._clock()

    def reset(self) -> None:
        """Remove all cached states, and start the statistics again."""
        with self._lock:
            self._reset_cache()
        self.stats.reset()

    def is_alive(self) -> bool:
        """Return whether the model can still work. Any thread may call it."""
        return self._model.is_alive()

    def evict_idle(self) -> None:
        """Remove all cached states once the oldest have passed the time limit. Any thread may call it."""
        if self._lock.acquire(blocking=False):
            try:
                self._reset_cache_if_due()
            except Exception as error:  # noqa: BLE001 - a model that is broken shows with the next call
                log.warning("the prefix cache could not be reset: %s", type(error).__name__)
            finally:
                self._lock.release()

    def _reset_cache_if_due(self) -> None:
        # All states, because the model does not report when each was last used.
        if self._cached_since is None or self._clock() - self._cached_since < self._prefix_cache_ttl:
            return
        self._reset_cache()

    def _reset_cache(self) -> None:
        if self._model.reset_cache():
            self._cached_since = None
        else:
            log.warning("the prefix cache could not be reset yet; this is tried again")

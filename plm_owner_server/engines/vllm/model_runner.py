"""Requests of hidden states to a model that schedules itself, such as vLLM, and checks of its results.

Such a model caches states of texts' prefixes, and leaves out the positions that it did not compute again. The number of
positions is checked on every result. A result without all requested positions is requested again from its first token.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from plm_owner_server.engines.interface import EngineStats, PassKind
from protocol.errors import ServerFault

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class HiddenStateQuery:
    """A request to the model for the hidden states of one text.

    Attributes:
        token_ids: token ids of the text.
        tenant: the tenant that the text belongs to.
        last_only: only the last position is requested.
        skip_cache: compute every position, also those of a cached prefix.
    """

    token_ids: list[int]
    tenant: str
    last_only: bool
    skip_cache: bool


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """The model's result for one text.

    Attributes:
        token_ids: token ids of the text that was run.
        hidden_T_D: last hidden states from position `cached_tokens` on, or of the last position alone; on the CPU.
        cached_tokens: number of leading tokens that were not run because they were cached.
    """

    token_ids: list[int]
    hidden_T_D: Tensor
    cached_tokens: int

    def is_complete_for(self, positions: PositionRange) -> bool:
        """Return whether it has all requested positions, and as many as the model claims to have run."""
        if positions.rows == 1:
            return len(self.hidden_T_D) == 1
        return len(self.hidden_T_D) == len(positions.token_ids) - self.cached_tokens >= positions.rows


@dataclass(frozen=True, eq=False)
class PositionRange:
    """Requested positions of one text.

    Attributes:
        token_ids: token ids of the text.
        start: first requested position; all positions after it are requested, too.
        tenant: the tenant that asks; cached states are never shared between tenants.
    """

    token_ids: list[int]
    start: int
    tenant: str = ""

    @property
    def rows(self) -> int:
        """Number of requested positions."""
        return len(self.token_ids) - self.start

    def query(self, block_tokens: int | None = None) -> HiddenStateQuery:
        """The request to the model for these positions.

        Args:
            block_tokens: number of tokens in a block of the model's cache; None if the cache must not be used.
        """
        last_only = self.rows == 1
        # The cached prefix must end before the first requested position. It usually does; the result shows.
        skip_cache = block_tokens is None or not (last_only or self.start >= block_tokens)
        return HiddenStateQuery(self.token_ids, self.tenant, last_only=last_only, skip_cache=skip_cache)


class PoolingModel(Protocol):
    """A model without its LM head.

    Attributes:
        block_tokens: number of tokens in a block; prefixes are cached in whole blocks.
    """

    block_tokens: int

    def run(self, queries: Sequence[HiddenStateQuery]) -> list[HiddenStates]:
        """Results of all queries, in their order. The model forms batches as it likes."""

    def reset_cache(self) -> bool:
        """Remove all cached states. Return whether they could be removed."""

    def is_alive(self) -> bool:
        """Return whether the model can still work, without running it."""


class PooledRunner:
    """Runs texts on a model that schedules itself.

    Args:
        model: the model.
        prefix_cache_ttl: seconds after their computation at which all cached states are removed.
        clock: current time, in seconds.

    Attributes:
        stats: statistics of what was run.
    """

    def __init__(
        self, model: PoolingModel, *, prefix_cache_ttl: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._model = model
        self._prefix_cache_ttl = prefix_cache_ttl
        self._clock = clock
        self._cached_since: float | None = None  # time of the oldest cached states; None if there are none
        self._lock = threading.Lock()  # held while the model works or resets its cache
        self.stats = EngineStats()

    def run(self, ranges: Sequence[PositionRange], kind: PassKind) -> tuple[list[HiddenStates], int]:
        """Results with exactly the requested positions, and the number of tokens that were run for them.

        Raises:
            ServerFault: the model returned other positions than requested.
        """
        with self._lock:
            self._reset_cache_if_due()
            self._cached_since = self._clock() if self._cached_since is None else self._cached_since
            results = self._model.run([positions.query(self._model.block_tokens) for positions in ranges])
            ran = self._record(kind, results)
            incomplete = [i for i, result in enumerate(results) if not result.is_complete_for(ranges[i])]
            if incomplete:
                repeated = self._model.run([ranges[i].query() for i in incomplete])
                ran += self._record(kind, repeated)
                for i, result in zip(incomplete, repeated, strict=True):
                    results[i] = result
        if not all(result.is_complete_for(positions) for positions, result in zip(ranges, results, strict=True)):
            raise ServerFault(
                "The model returned other positions than requested.", hint="Report this to the owner; try again."
            )
        requested = [
            replace(result, hidden_T_D=result.hidden_T_D[-positions.rows :])
            for positions, result in zip(ranges, results, strict=True)
        ]
        return requested, ran

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
        # A thread that holds the lock for a run checks this at its next run.
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

    def _record(self, kind: PassKind, results: Sequence[HiddenStates]) -> int:
        ran = sum(len(result.token_ids) - result.cached_tokens for result in results)
        self.stats.record(kind, ran, ran)
        self.stats.cached_tokens += sum(result.cached_tokens for result in results)
        return ran

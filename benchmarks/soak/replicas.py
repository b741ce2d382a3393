"""Two real servers that share a store: one of them is killed now and then, and comes back on its ports."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.soak.lines import GrpcLine, Line, RestLine
from benchmarks.soak.tenants import Tenant
from harness.processes import RestartableServer


class Replica:
    """A server, as the generator knows it. Use it from one event loop.

    Args:
        log: what it writes.
        flags: of `pema-server serve`.

    Attributes:
        up: whether it has said that it is ready, and was not killed since.
        kills: how often it was killed.
        in_flight: calls that it has not answered yet.
    """

    def __init__(self, log: Path, flags: Sequence[str]) -> None:
        self._server = RestartableServer(log, flags)
        self._lines: dict[tuple[str, str], Line] = {}
        self._left: list[Line] = []
        self.up = True
        self.kills = 0
        self.in_flight = 0

    def port(self, scheme: str) -> int:
        """Where it listens: `http` or `grpc`."""
        return self._server.port(scheme)

    def line(self, tenant: Tenant, scheme: str) -> Line:
        """A tenant's connections to it; others after a restart."""
        if (line := self._lines.get((tenant.name, scheme))) is None:
            port = self.port(scheme)
            line = RestLine(port, tenant.key, tenant.chance) if scheme == "http" else GrpcLine(port, tenant.key)
            self._lines[tenant.name, scheme] = line
        return line

    def rss_mib(self) -> float:
        """Its resident memory."""
        return float(psutil.Process(self._server.process.pid).memory_info().rss / 2**20)

    async def kill_and_restart(self) -> None:
        """Kill it, as a lack of memory would, and have it back."""
        self.up = False
        self.kills += 1
        self._server.process.kill()  # at once: no call may begin after this and be answered
        await asyncio.to_thread(self._server.kill)
        await asyncio.to_thread(self._server.start)
        # Not closed yet, for that would end calls that have just begun on them.
        self._left += self._lines.values()
        self._lines = {}
        self.up = True

    async def stop(self) -> None:
        """End it properly."""
        for line in (*self._left, *self._lines.values()):
            await line.close()
        await asyncio.to_thread(self._server.stop)

"""Two real servers that share a store. One is killed from time to time and restarted on its ports."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.soak.lines import GrpcLine, Line, RestLine
from benchmarks.soak.tenants import Tenant
from harness.processes import RestartableServer


class Replica:
    """A server and the tenants' connections to it. Use it from one event loop.

    Args:
        log: file of the server's log.
        flags: flags of `pema-server serve`.

    Attributes:
        up: whether it has reported that it is ready, and was not killed since.
        kills: number of times that it was killed.
        in_flight: number of calls that it has not answered yet.
    """

    def __init__(self, log: Path, flags: Sequence[str]) -> None:
        self._server = RestartableServer(log, flags)
        self._lines: dict[tuple[str, str], Line] = {}
        self._old_lines: list[Line] = []
        self.up = True
        self.kills = 0
        self.in_flight = 0

    def port(self, scheme: str) -> int:
        """Port for the scheme `http` or `grpc`."""
        return self._server.port(scheme)

    def line(self, tenant: Tenant, scheme: str) -> Line:
        """The tenant's connection to it; a new one after a restart."""
        if (line := self._lines.get((tenant.name, scheme))) is None:
            port = self.port(scheme)
            line = RestLine(port, tenant.key, tenant.chance) if scheme == "http" else GrpcLine(port, tenant.key)
            self._lines[tenant.name, scheme] = line
        return line

    def rss_mib(self) -> float:
        """Resident memory of the server process, in MiB."""
        return float(psutil.Process(self._server.process.pid).memory_info().rss / 2**20)

    async def kill_and_restart(self) -> None:
        """Kill the server with SIGKILL, and restart it."""
        self.up = False
        self.kills += 1
        self._server.process.kill()  # at once: no call may begin after this and be answered
        await asyncio.to_thread(self._server.kill)
        await asyncio.to_thread(self._server.start)
        # Not closed yet: that would end calls that have just begun on them.
        self._old_lines += self._lines.values()
        self._lines = {}
        self.up = True

    async def stop(self) -> None:
        """Close all connections and stop the server."""
        for line in (*self._old_lines, *self._lines.values()):
            await line.close()
        await asyncio.to_thread(self._server.stop)

"""`pema-client gateway` as a child process."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from harness.processes import client_command, stop_server

_READY_WITHIN_SECONDS = 240.0
# The start's last words.
_READY = "sees every prompt"
_ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")


class RunningGateway(NamedTuple):
    """A gateway that serves: its address, its process, and the file with its output."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def running_gateway(
    log: Path, server: str, adapters: Mapping[str, Path], *flags: str, environment: Mapping[str, str] | None = None
) -> Iterator[RunningGateway]:
    """A gateway on a free port, once it serves; stopped at the end unless it has ended.

    Args:
        log: file for its output, which is emptied.
        server: address of the owner's server.
        adapters: the adapters' folders by name.
        flags: further flags of the command.
        environment: variables to set beside those of this process.

    Raises:
        RuntimeError: it did not start, or did not end well.
    """
    named = [f"--adapter={name}={folder}" for name, folder in adapters.items()]
    with log.open("wb") as output:
        process = subprocess.Popen(
            client_command(server, "gateway", "--port", "0", *named, *flags),
            stdout=output,
            stderr=output,
            env=os.environ | dict(environment or {}),
        )
    try:
        yield RunningGateway(_address(process, log), process, log)
    finally:
        if process.poll() is None:
            stop_server(process, log)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """The address that the start announces.

    Raises:
        RuntimeError: the gateway has stopped, or takes too long.
    """
    deadline = time.monotonic() + _READY_WITHIN_SECONDS
    while _READY not in (said := log.read_text(encoding="utf-8")):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"The gateway did not start:\n{said}")
        time.sleep(0.05)
    found = _ADDRESS.search(said)
    if found is None:
        raise RuntimeError(f"The gateway named no address:\n{said}")
    return found[0]

"""Steps that the demos share: the owner's server, the tenant's key, and commands of the data owner.

Finished commands are reused, so that a stopped demo continues where it was.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_owner_client.runtime.atomic_files import write_atomically
from data_owner_client.runtime.console import PlainConsole
from harness.processes import (
    Ports,
    ServerNotReady,
    client_command,
    start_server,
    stop_server,
    wait_until_ready,
)

_READY_WITHIN_SECONDS = 600.0
_TENANT = "data-owner"

console = PlainConsole()


def stop_servers_on_termination() -> None:
    """Let a terminated demo end as an interrupted one, so that it still stops its server."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


class Client:
    """Runs `pema-client` commands and stores their results, so that a finished step is not run again.

    Args:
        url: URL of the owner's server.
        key: the data owner's API key.
        folder: folder of the results.
    """

    def __init__(self, url: str, key: str, folder: Path) -> None:
        self._url = url
        self._environment = os.environ | {"PEMA_API_KEY": key}
        self._folder = folder
        self._fresh = False

    def step(self, verb: str, arguments: list[Any], *, name: str = "") -> dict[str, Any]:
        """The result of one verb, which is run unless it was run with these arguments before.

        Args:
            verb: the verb.
            arguments: its arguments.
            name: name of the step, if the verb is run more than once.
        """
        texts = [str(argument) for argument in arguments]
        path = self._folder / "steps" / f"{name or verb}.json"
        # A step that was run again makes the results of all later ones stale.
        if (
            not self._fresh
            and path.exists()
            and (record := json.loads(path.read_text(encoding="utf-8")))["arguments"] == texts
        ):
            console.print(f"done already: pema-client {verb} (delete {path} to run it again)")
            result: dict[str, Any] = record["result"]
            return result
        command = client_command(self._url, verb, "--json", *texts)
        console.print(f"$ pema-client {verb} {' '.join(texts)}")
        done = subprocess.run(command, stdout=subprocess.PIPE, env=self._environment, check=False)
        if done.returncode:
            sys.exit(
                f"demo: pema-client {verb} failed; its message is above, the server's log is {self._folder}/server.log"
            )
        result = json.loads(done.stdout)
        self._fresh = True
        write_atomically(path, json.dumps({"arguments": texts, "result": result}, ensure_ascii=False).encode())
        return result


def tenant_key(folder: Path) -> str:
    """The data owner's API key. Adds the tenant first, who gets rows of candidate tokens only, in a secret basis."""
    path = folder / "key"
    path.touch(mode=0o600)
    if not path.read_text():
        console.rule("The PLM owner adds the data owner as a tenant")
        console.print(f"$ pema-server tenants add {_TENANT}")
        # If the tenant exists, an earlier run was stopped before it stored the key.
        added = _tenants(folder, "add")
        key = added if added.returncode == 0 else _tenants(folder, "rotate-key")
        if key.returncode:
            sys.exit(f"demo: {added.stderr.strip()}")
        path.write_text(key.stdout)
    return path.read_text().strip()


def _tenants(folder: Path, verb: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "plm_owner_server.cli", "tenants", verb, _TENANT, "--store", _store(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _store(folder: Path) -> str:
    return f"sqlite:///{folder / 'owner.db'}"


@contextmanager
def owner_server(port: int, folder: Path) -> Iterator[str]:
    """Run the PLM owner's server in a separate process. Yields its URL once it is ready."""
    console.rule("The PLM owner's server starts (the first time, the model is unpacked: about a minute)")
    url, log, ports = f"http://127.0.0.1:{port}", folder / "server.log", Ports(port, 0)
    log.unlink(missing_ok=True)
    server = start_server(log, ports, "--store", _store(folder), environment={"HF_HUB_OFFLINE": "1"})
    try:
        wait_until_ready(server, url, log, within_seconds=_READY_WITHIN_SECONDS)
        yield url
    except ServerNotReady as error:
        sys.exit(f"demo: {error}")
    finally:
        if server.poll() is None:
            stop_server(server, log)


def read_records(path: Path) -> list[dict[str, str]]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write a report as JSON."""
    write_atomically(path, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())


def machine() -> dict[str, Any]:
    """The machine and the versions that decide times and scores."""
    return {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }

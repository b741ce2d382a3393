"""`pema-client` in the process of the tests: a command line in; exit status, output and errors out."""

from __future__ import annotations

import io
import json
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from data_owner_client.cli import run
from tests import guard

WORDS = ["the", "thin", "die", "Tür", "an", "on", "shine", "reden", "her"]
_ENVIRONMENT = {"COLUMNS": "200", "TERM": "dumb"}


def client(url: str | None, verb: str, *arguments: Any, stdin: str = "") -> CompletedProcess[str]:
    """Run a `pema-client` verb as the command would, with what it needs to pass the guard in its environment.

    Args:
        url: the server's; None for verbs that need none.
        verb: the command; with a space, one of a group, such as `data check`.
        arguments: after it.
        stdin: text on standard input.
    """
    server = ["--server", url] if url else []
    command = [*verb.split(), *server, *map(str, arguments)]
    environment = guard.current.client_environment if guard.current else {}
    output, errors = io.StringIO(), io.StringIO()
    with (
        _levels_of_loggers(),
        _surroundings(stdin, _ENVIRONMENT | dict(environment)),
        redirect_stdout(output),
        redirect_stderr(errors),
    ):
        status = run(command)
    return CompletedProcess(command, status, output.getvalue(), errors.getvalue())


def client_json(url: str | None, verb: str, *arguments: Any, stdin: str = "") -> Any:
    """The JSON that a verb prints."""
    done = client(url, verb, "--json", *arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def write_pairs(path: Path, count: int, seed: int) -> Path:
    """Write this many pairs of few words, which the seed chooses, as JSON lines."""
    rng = random.Random(seed)
    records = [
        {
            "source": f"{' '.join(rng.choices(WORDS, k=3))} {i}",
            "target": " ".join(rng.choices(WORDS, k=rng.randint(1, 4))),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@contextmanager
def _surroundings(stdin: str, environment: Mapping[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
        for name, value in environment.items():
            patched.setenv(name, value)
        yield


@contextmanager
def _levels_of_loggers() -> Iterator[None]:
    """A command sets levels for its own process, which the other tests share."""
    loggers = [logging.getLogger(name) for name in ("data_owner_client", "grpc")]
    levels = [logger.level for logger in loggers]
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

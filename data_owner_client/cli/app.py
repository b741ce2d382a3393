"""The application: what all commands have in common."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, NoReturn, ParamSpec

import torch
import typer

from data_owner_client.cli.options import with_options
from protocol.errors import PemaError

_P = ParamSpec("_P")
_INTERRUPTED = 130  # what shells make of SIGINT

app = typer.Typer(
    help="PEMA, the data owner's side: adapt somebody else's language model to your private task.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)


def _leave(message: str, *, status: int) -> NoReturn:
    """End at once. sys.exit would wait for threads that wait for the server; every file is written whole or not."""
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    os._exit(status)


def _clear_errors(command: Callable[_P, None]) -> Callable[_P, None]:
    """Errors as one line that says what to do, and exit status 1; never a traceback for a user's mistake."""

    @wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except PemaError as error:
            _leave(f"pema-client: {error}", status=1)
        except KeyboardInterrupt:
            again = "run the same command again (build-memory and train go on where they were, as do files of texts)"
            _leave(f"pema-client: interrupted; {again}.", status=_INTERRUPTED)
        except BrokenPipeError:
            # The reader of our output, such as head, has gone.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return run


def command(name: str | None = None) -> Callable[[Callable[_P, None]], Callable[..., None]]:
    """Makes a function a command, with the options of the groups among its arguments, and clear errors."""

    def register(function: Callable[_P, None]) -> Callable[..., None]:
        return app.command(name)(with_options(_clear_errors(function)))

    return register


@app.callback()
def options(
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Log every request with its id, which the server logs, too.")
    ] = False,
) -> None:
    """PEMA, the data owner's side: adapt somebody else's language model to your private task."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("data_owner_client").setLevel(logging.DEBUG if verbose else logging.WARNING)
    # It logs tracebacks of garbled answers, which we are told of, too, and ask for again.
    logging.getLogger("grpc").setLevel(logging.CRITICAL)


def set_threads(threads: int) -> None:
    """Use so many CPU threads; 0 for all cores."""
    if threads:
        torch.set_num_threads(threads)

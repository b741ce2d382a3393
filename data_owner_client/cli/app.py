"""The application: the parser, clear errors and exit statuses, common to all commands."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from typing import Annotated, Any, NoReturn, TypeVar

import pydantic  # with it imported, cyclopts checks the bounds in annotations
from cyclopts import (
    App,
    Argument,
    CycloptsError,
    Group,
    Parameter,
    UnknownOptionError,
    UnusedCliTokensError,
    ValidationError,
)

from data_owner_client.cli.old_names import with_current_names
from data_owner_client.runtime.validation_errors import first_message
from protocol import standard_streams
from protocol.errors import PemaError

_Command = TypeVar("_Command", bound=Callable[..., int | None])
_USAGE = 2
_INTERRUPTED = 130  # the status that shells give for SIGINT
# The order of the help: that of the work.
_ORDER = (
    *("info", "doctor", "data", "build-memory", "train", "sweep"),
    *("apply", "generate", "evaluate", "compare", "gateway", "fetch-head"),
)


def _default_text(value: Any) -> str | None:
    """The default in the help; None to show none."""
    if value is None or value is False or value == ():
        return None
    return "yes" if value is True else str(value)


def _require_utf8(_: Any, value: Any) -> None:
    """Require texts without bytes that are not UTF-8. A path may have them; a secret is checked where it is used.

    Raises:
        UnicodeEncodeError: a text has such bytes.
    """
    if isinstance(value, str):
        value.encode()
    parts = [getattr(value, each.name) for each in fields(value) if each.repr] if is_dataclass(value) else value
    for part in parts if isinstance(parts, list) else []:
        _require_utf8(None, part)


app = App(
    name="pema-client",
    help="PEMA, the data owner's side: adapt somebody else's language model to your private task.",
    help_format="markdown",
    version=lambda: version("pema"),
    default_parameter=Parameter(
        negative_bool=(),
        negative_iterable=(),
        allow_leading_hyphen=True,
        show_default=_default_text,
        validator=_require_utf8,
    ),
    group_parameters=Group("Output", sort_key=6),
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
    suppress_keyboard_interrupt=False,
)
app.meta.group_parameters = Group("Global", sort_key=8)
app.meta.suppress_keyboard_interrupt = False


@app.meta.default
def _with_global_options(
    *tokens: Annotated[str, Parameter(show=False, validator=None)],
    verbose: Annotated[bool, Parameter(help="Log every request with its id, which the server logs, too.")] = False,
) -> int | None:
    if verbose:
        logging.getLogger("data_owner_client").setLevel(logging.DEBUG)
    status: int | None = app(tokens)
    return status


def command_group(name: str, sentence: str) -> App:
    """A command that has commands of its own.

    Args:
        name: name of the command.
        sentence: its line in the help.
    """
    group = App(name=name, help=sentence, help_format="markdown", version_flags=(), sort_key=_ORDER.index(name))
    app.command(group)
    return group


def command(name: str | tuple[str, ...] | None = None, *, group: App | None = None) -> Callable[[_Command], _Command]:
    """Make a function a command, whose help is the whole docstring, examples included.

    Args:
        name: name of the command; None for that of the function.
        group: the command that it belongs to; None for none.
    """

    def register(function: _Command) -> _Command:
        # As a section of its own, the parser of docstrings would leave the examples out.
        words = inspect.cleandoc(function.__doc__ or "").replace("Examples:", "**Examples**", 1)
        first = (name[0] if isinstance(name, tuple) else name) or function.__name__
        if group is None:
            app.command(function, name=name, help=words, sort_key=_ORDER.index(first))
        else:
            group.command(function, name=name, help=words)
        return function

    return register


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command line in this process and return its exit status.

    Results go to `sys.stdout`, and errors as one line to `sys.stderr`, both as they are at the time of the call.

    Args:
        argv: arguments after the program's name; None for those of this process.

    Returns:
        0 on success, 1 for an error of the work, 2 for a mistake in the command line, 130 when interrupted.
    """
    try:
        with _warnings_on_stderr():
            status = app.meta(with_current_names(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except CycloptsError as error:
        verb = "".join(f" {word}" for word in error.command_chain or ())
        return _failed(f"{_usage_error(error)} See pema-client{verb} --help.", status=_USAGE)
    except PemaError as error:
        return _failed(str(error), status=1)
    except KeyboardInterrupt:
        again = "run the same command again (build-memory and train go on where they were, as do files of texts)"
        return _failed(f"interrupted; {again}.", status=_INTERRUPTED)
    except (BrokenPipeError, SystemExit):  # rich, which prints the help, ends the program where a pipe is broken
        standard_streams.flush()
        return 0
    except OSError as error:  # such as a full disk
        return _failed(standard_streams.fault_of(error), status=1)
    return status or 0


def main() -> NoReturn:
    """Entry point of `pema-client`: run the command line of this process and end it."""
    standard_streams.use_utf8()
    status = run()
    if status == 0:
        sys.exit()
    # sys.exit would wait for threads that wait for the server; every file is written whole or not at all.
    standard_streams.flush()
    os._exit(status)


def set_threads(threads: int) -> None:
    """Use this many CPU threads; 0 for all cores that this process may use."""
    import torch

    from protocol.cores import torch_threads

    torch.set_num_threads(torch_threads(threads))


def _failed(message: str, *, status: int) -> int:
    standard_streams.flush()
    standard_streams.say(f"pema-client: {message}")
    return status


def _usage_error(error: CycloptsError) -> str:
    """The parser's message as one line."""
    error.verbose = False
    if isinstance(error, ValidationError) and isinstance(error.__cause__, pydantic.ValidationError):
        error.exception_message = f"{first_message(error.__cause__)}."
    if isinstance(error, ValidationError) and isinstance(error.__cause__, UnicodeEncodeError):
        error.value, error.exception_message = error.__cause__.object, "It is not UTF-8."
        error.argument = error.argument and _argument_with(error.argument, error.value)
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return f"Unexpected argument {error.unused_tokens[0]!r}."
    message = " ".join(str(error).split())
    if isinstance(error, UnknownOptionError):
        word = error.token.keyword or error.token.value
        if not word.startswith("--") or " " in word:
            return f"{message} Put -- before texts that begin with a hyphen."
    return message


def _argument_with(argument: Argument, text: str) -> Argument:
    """The argument itself, or the field of it, that has a text from the command line or the environment."""
    parts: tuple[Argument, ...] = (argument, *argument.children_recursive)
    return next(part for part in parts if any(token.value == text for token in part.tokens))


class _StderrHandler(logging.Handler):
    """Prints to standard error as it is at that time: while a bar is drawn, lines appear above it."""

    def emit(self, record: logging.LogRecord) -> None:
        standard_streams.say(self.format(record))


@contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Show warnings of this package on the standard error stream, and nothing of gRPC's."""
    ours, grpc = logging.getLogger("data_owner_client"), logging.getLogger("grpc")
    levels = ours.level, grpc.level
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours.addHandler(handler)
    ours.setLevel(logging.WARNING)
    # gRPC logs tracebacks of garbled answers, which are retried and reported anyway.
    grpc.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(levels[0])
        grpc.setLevel(levels[1])

"""The command `pema-server` and its subcommands."""

from __future__ import annotations

import sys

from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliApp, CliSubCommand

from plm_owner_server.cli.help_source import HelpSource
from plm_owner_server.cli.old_names import with_current_names
from plm_owner_server.cli.serve import Serve
from plm_owner_server.cli.tenants import Tenants
from protocol import standard_streams
from protocol.errors import PemaError


class Command(BaseSettings):
    """PEMA, the PLM owner's side: serve a language model without giving its weights away."""

    serve: CliSubCommand[Serve]
    tenants: CliSubCommand[Tenants]

    def cli_cmd(self) -> None:
        """Run the subcommand."""
        CliApp.run_subcommand(self)


_COMMANDS = frozenset(Command.model_fields)


def run() -> None:
    """Parse the arguments and run the subcommand that they name."""
    standard_streams.use_utf8()
    try:
        arguments = with_current_names(sys.argv[1:])
        CliApp.run(Command, cli_args=arguments, cli_settings_source=HelpSource(Command, "pema-server"))
        sys.stdout.flush()
    except PemaError as error:
        sys.exit(f"pema-server: {error}")
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        flag = next((part for part in reversed(first["loc"]) if isinstance(part, str)), "")
        if flag in _COMMANDS:  # no single flag is wrong, but several together
            sys.exit(f"pema-server: {message}. See pema-server {flag} --help.")
        words = f"--{flag.replace('_', '-')} (or its environment variable)"
        sys.exit(f"pema-server: {words}: {message}. See pema-server --help.")
    except BrokenPipeError:
        pass  # the reader of the output, such as head, has gone
    except OSError as error:  # such as a full disk
        sys.exit(f"pema-server: {standard_streams.fault_of(error)}")
    finally:
        standard_streams.flush()

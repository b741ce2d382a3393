"""Options that several verbs of `pema-client` share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from data_owner_client import verbs
from data_owner_client.connection import GIVE_UP_AFTER_S
from data_owner_client.data import Format
from data_owner_client.decoding.interpolation import Schedule
from data_owner_client.plm import RemotePlm
from protocol.messages import WireDtype

_Server = Annotated[
    str,
    typer.Option(
        "--server",
        envvar="PEMA_SERVER",
        help="Address of the PLM owner's server: http://, https://, grpc:// or grpcs://.",
        rich_help_panel="Connection",
    ),
]
_ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="PEMA_API_KEY",
        help="Key that the owner gave you. Better set in the environment: everybody on the machine can see options.",
        rich_help_panel="Connection",
    ),
]
_Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure",
        help="Send the key unencrypted, over http:// or grpc:// to another machine.",
        rich_help_panel="Connection",
    ),
]
_Timeout = Annotated[
    float,
    typer.Option("--timeout", min=0.1, help="Longest wait for one answer, in seconds.", rich_help_panel="Connection"),
]
_GiveUpAfter = Annotated[
    float,
    typer.Option(
        "--give-up-after",
        min=0.0,
        help="How long to try again when the server is gone or too busy, in seconds.",
        rich_help_panel="Connection",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Dtype = Annotated[
    WireDtype, typer.Option(help="Number format of representations on the wire and on disk; int8 is half of float16.")
]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads of this client; 0 for all cores.")]
MemoryFolder = Annotated[Path, typer.Option("--memory", help="Folder of the external memory.")]
AdapterFolder = Annotated[Path, typer.Option("--adapter", help="Folder of the adapter.")]
OptionalAdapter = Annotated[Path | None, typer.Option("--adapter", help="Folder of the adapter; none: the PLM alone.")]
InputFile = Annotated[
    Path | None, typer.Option("--input", help="JSONL, TSV, CSV or text with one source a line; - is standard input.")
]
Sources = Annotated[Path | None, typer.Option(help="Text file with one source a line; goes with --targets.")]
Targets = Annotated[Path | None, typer.Option(help="Text file with one target a line; goes with --sources.")]
FileFormat = Annotated[Format | None, typer.Option("--format", help="Format of the input; default: from its suffix.")]
SourceField = Annotated[str, typer.Option(help="Name of the source field or column.")]
TargetField = Annotated[str, typer.Option(help="Name of the target field or column.")]
Output = Annotated[
    Path | None, typer.Option("--output", help="File for the texts, one a line; default: standard output.")
]
OptionalSchedule = Annotated[
    Schedule | None, typer.Option(help="Schedule of λ; default: what training chose on the validation memory.")
]
LambdaMax = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="λ_max; default: what training chose, or 0.9.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
LookAhead = Annotated[int, typer.Option(min=0, help="Tokens that the server drafts per call. Never changes the text.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences in one call.")]
ShareTargets = Annotated[
    bool, typer.Option("--share-targets", help="Allow target texts to be shown to the owner of the PLM.")
]


@dataclass(frozen=True)
class Server:
    """What the options say of the connection."""

    server: _Server = "http://127.0.0.1:8000"
    api_key: _ApiKey = None
    insecure: _Insecure = False
    timeout: _Timeout = 600.0
    give_up_after: _GiveUpAfter = GIVE_UP_AFTER_S

    def connect(self, dtype: WireDtype = "float16") -> RemotePlm:
        """The PLM behind it."""
        return verbs.connect(
            self.server,
            dtype=dtype,
            api_key=self.api_key,
            insecure=self.insecure,
            timeout_s=self.timeout,
            give_up_after_s=self.give_up_after,
        )


def with_server(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a connection; it gets them as one argument, `server`."""
    signature = inspect.signature(command, eval_str=True)
    options = inspect.signature(Server, eval_str=True).parameters
    own = [parameter for name, parameter in signature.parameters.items() if name != "server"]

    @wraps(command)
    def run(**arguments: Any) -> None:
        server = Server(**{name: arguments.pop(name) for name in options})
        command(**arguments, server=server)

    keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *options.values())]
    vars(run)["__signature__"] = signature.replace(parameters=keyword_only)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in keyword_only}
    return run

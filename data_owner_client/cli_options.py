"""Options that several verbs of `pema-client` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_owner_client.data import Format
from data_owner_client.decoding.interpolation import Schedule
from protocol.messages import WireDtype

DEFAULT_SERVER = "http://127.0.0.1:8000"

Server = Annotated[
    str,
    typer.Option(
        "--server",
        envvar="PEMA_SERVER",
        help="Address of the PLM owner's server: http://, https://, grpc:// or grpcs://.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Dtype = Annotated[WireDtype, typer.Option(help="Number format of representations on the wire and on disk.")]
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

"""`pema-client info`, `doctor`, `fetch-head`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_owner_client.cli.app import command
from data_owner_client.cli.doctor import diagnose
from data_owner_client.cli.options import AsJson, ServerOptions
from data_owner_client.cli.output import print_record
from data_owner_client.runtime.progress import RichReporter

_DOCTOR_WAITS_S = 10.0


@command()
def info(server: ServerOptions, as_json: AsJson = False) -> None:
    """Show which model a server has, what it allows, and what is left of your quotas.

    Example: `pema-client info --server http://127.0.0.1:8000`
    """
    with server.connect() as plm:
        record = plm.card.model_dump()
        if plm.rate_limits:
            record["left"] = {a.name: asdict(a) if as_json else str(a) for a in plm.rate_limits}
        print_record(record, as_json, title=plm.card.name)


@command()
def doctor(
    server: ServerOptions,
    memory: Annotated[list[Path] | None, typer.Option(help="Memories to check; default: ./memory.")] = None,
    adapter: Annotated[list[Path] | None, typer.Option(help="Adapters to check; default: ./adapter.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check the way to a server, and that memories, adapters and the cached LM head belong to its model.

    Tells how a round trip's time splits into network, queue, compute and serialisation. Exit status 1 if a check fails.

    Examples:

    - `pema-client doctor --server https://plm.example.com`
    - `pema-client doctor --memory memory --adapter adapter --json`
    """
    impatient = replace(
        server,
        give_up_after=min(server.give_up_after, _DOCTOR_WAITS_S),
        timeout=min(server.timeout, 3 * _DOCTOR_WAITS_S),
    )
    diagnosis = diagnose(
        impatient.connect,
        memory if memory is not None else [path for path in [Path("memory")] if path.is_dir()],
        adapter if adapter is not None else [path for path in [Path("adapter")] if path.is_dir()],
    )
    if as_json:
        print_record(diagnosis.model_dump(), as_json, title="")
    else:
        table = Table("", "check", "found", "advice", title=server.server)
        for finding in diagnosis.findings:
            mark = "[green]✓[/]" if finding.ok else "[red]✗[/]"
            table.add_row(mark, *map(escape, (finding.check, finding.detail, finding.advice)))
        Console().print(table)
    if not diagnosis.healthy:
        raise typer.Exit(1)


@command("fetch-head")
def fetch_head(server: ServerOptions, as_json: AsJson = False) -> None:
    """Download the whole LM head into the cache, for work that needs more than the candidates' rows.

    Interrupted, the same command goes on where it stopped. What is there is checked against the server's digest.

    Example: `pema-client fetch-head --server grpc://127.0.0.1:8001`
    """
    with server.connect() as plm:
        head = plm.fetch_head(RichReporter())
        record = {"folder": str(head.folder), "rows": head.rows, "sha256": plm.card.head_digest}
    print_record(record, as_json, title="LM head")

"""`pema-client info`, `doctor`, `fetch-head`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from data_owner_client.cli.app import command
from data_owner_client.cli.options import DATA, DEFAULT_SERVER, AsJson, Connection, PathOption, Server, connected
from data_owner_client.plm.connection.settings import DEFAULT_CONNECTION

_DOCTOR_WAITS_SECONDS = 10.0


@command()
def info(
    *, server: Server = DEFAULT_SERVER, connection: Connection = DEFAULT_CONNECTION, as_json: AsJson = False
) -> None:
    """Show which model a server has, what it allows, and what is left of your quotas.

    Examples:

    - `pema-client info --server http://127.0.0.1:8000`
    """
    from data_owner_client.cli.output import print_record

    with connected(server, connection) as plm:
        record = plm.card.model_dump()
        if plm.rate_limits:
            record["left"] = {a.name: asdict(a) if as_json else str(a) for a in plm.rate_limits}
        print_record(record, as_json, title=plm.card.name)


@command()
def doctor(
    *,
    memory: Annotated[
        list[PathOption] | None, Parameter(help="Memories to check. Default: ./memory.", group=DATA)
    ] = None,
    adapter: Annotated[
        list[PathOption] | None, Parameter(help="Adapters to check. Default: ./adapter.", group=DATA)
    ] = None,
    server: Server = DEFAULT_SERVER,
    connection: Connection = DEFAULT_CONNECTION,
    as_json: AsJson = False,
) -> int:
    """Check the way to a server, and that memories, adapters and the cached LM head belong to its model.

    Shows how a round trip's time splits into network, queue, compute and serialisation. Exit status 1 if a check fails.

    Examples:

    - `pema-client doctor --server https://plm.example.com`
    - `pema-client doctor --memory memory --adapter adapter --json`
    """
    from data_owner_client.cli.doctor import diagnose
    from data_owner_client.cli.output import print_diagnosis, print_record

    impatient = replace(
        connection,
        retry_for=min(connection.retry_for, _DOCTOR_WAITS_SECONDS),
        timeout=min(connection.timeout, 3 * _DOCTOR_WAITS_SECONDS),
    )
    diagnosis = diagnose(
        lambda: connected(server, impatient),
        memory if memory is not None else [path for path in [Path("memory")] if path.is_dir()],
        adapter if adapter is not None else [path for path in [Path("adapter")] if path.is_dir()],
    )
    if as_json:
        print_record(diagnosis.model_dump(), as_json, title="")
    else:
        print_diagnosis(diagnosis, title=server)
    return 0 if diagnosis.healthy else 1


@command("fetch-head")
def fetch_head(
    *, server: Server = DEFAULT_SERVER, connection: Connection = DEFAULT_CONNECTION, as_json: AsJson = False
) -> None:
    """Download the whole LM head into the cache, for work that needs more than the candidates' rows.

    Interrupted, the same command goes on where it stopped. The rows are checked against the server's digest.

    Examples:

    - `pema-client fetch-head --server grpc://127.0.0.1:8001`
    """
    from data_owner_client.cli.output import print_record
    from data_owner_client.runtime.progress_display import stderr_reporter

    with connected(server, connection) as plm:
        head = plm.fetch_head(stderr_reporter())
        record = {"folder": str(head.folder), "rows": head.rows, "sha256": plm.card.head_digest}
    print_record(record, as_json, title="LM head")

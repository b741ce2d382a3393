"""`pema-client data check`."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge
from cyclopts import Parameter

from data_owner_client.cli.app import command, command_group
from data_owner_client.cli.options import (
    CONNECTION,
    DATA,
    OUTPUT,
    AsJson,
    Connection,
    PathOption,
    Reading,
    ShareEarlierAnswers,
    ShareRedacted,
    ShareTargets,
    chosen_context,
    connected,
)
from data_owner_client.data.reading.settings import DEFAULT_READING
from data_owner_client.plm.connection.settings import DEFAULT_CONNECTION

if TYPE_CHECKING:
    from data_owner_client.data.redaction.rules import Redaction
    from data_owner_client.data.tasks import Task

_DATA_COMMAND = command_group("data", "Look at files with texts, before anything is sent.")


@command("check", group=_DATA_COMMAND)
def check(
    file: Annotated[
        PathOption, Parameter(help="JSONL, JSON, CSV, TSV or Parquet with pairs; - is standard input.", group=DATA)
    ],
    /,
    *,
    validation: Annotated[PathOption | None, Parameter(help="Pairs held out for validation.", group=DATA)] = None,
    test: Annotated[PathOption | None, Parameter(help="Pairs to evaluate with.", group=DATA)] = None,
    task: Annotated[
        str | None,
        Parameter(
            help="Name of a built-in task, or a TOML file. Default: by the form of the file.",
            group=DATA,
            validator=None,
        ),
    ] = None,
    reading: Reading = DEFAULT_READING,
    price_per_million_tokens: Annotated[
        float | None, Ge(0), Parameter(help="Price that the owner asks, in any currency.", group=OUTPUT)
    ] = None,
    as_json: AsJson = False,
    server: Annotated[
        str | None,
        Parameter(
            help="Address of the PLM owner's server, for token counts and quotas. Default: none is asked.",
            env_var="PEMA_SERVER",
            group=CONNECTION,
        ),
    ] = None,
    connection: Connection = DEFAULT_CONNECTION,
    share_targets: ShareTargets = False,
    share_redacted: ShareRedacted = None,
    share_earlier_answers: ShareEarlierAnswers = False,
) -> int:
    """Say what a file is, and what is wrong with it. Nothing of it is sent.

    Shows the form that was recognised, lengths, duplicates, contradictions, overlaps between the files, labels, and
    all problems with their lines. With a server, its tokenizer counts tokens and marks those of the targets, and its
    quotas say what building a memory will take. `--share-targets`, `--share-redacted` and `--share-earlier-answers` say
    how you will build. With `--share-redacted`, spans that the rules find are counted and some are shown.

    The exit status is 1 if something must be mended, else 0.

    Examples:

    - `pema-client data check train.jsonl`
    - `pema-client data check train.parquet --validation dev.parquet --test test.parquet --labels bad good`
    - `pema-client data check train.jsonl --share-redacted rules.toml`
    - `pema-client data check chats.jsonl --task chat --server http://127.0.0.1:8000 --price-per-million-tokens 0.5`
    """
    from data_owner_client.cli.data_tables import print_data_report
    from data_owner_client.cli.output import print_record
    from data_owner_client.data.checking.files import check_files, read_parts
    from data_owner_client.data.reading.problems import Problems

    mode = chosen_context(None, share_targets=share_targets, share_redacted=share_redacted)
    redaction = _redaction(share_redacted)
    chosen, problems = _task(task), Problems()
    paths: list[Path] = [path for path in (file, validation, test) if path is not None]
    parts = read_parts(paths, reading, problems, are_labels=chosen is not None and chosen.kind == "classify")
    if server and server.strip():
        from data_owner_client.memory.data_check import check_with_model, default_task
        from data_owner_client.runtime.progress_display import stderr_reporter

        with connected(server, connection) as plm:
            report = check_with_model(
                plm,
                chosen or default_task(parts[0].report),
                parts,
                problems,
                memory_parts=1 + (validation is not None),
                context_mode=mode,
                redaction=redaction,
                share_earlier_answers=share_earlier_answers,
                price=price_per_million_tokens,
                reporter=stderr_reporter(),
            )
    elif chosen is None:
        report = check_files(parts, problems)
    else:
        from data_owner_client.data.checking.answers import check_answers  # needs torch

        report = check_answers(
            chosen,
            parts,
            problems,
            memory_parts=1 + (validation is not None),
            share_earlier_answers=mode != "private" or share_earlier_answers,
        )
    if redaction is not None and report.redaction is None:
        from data_owner_client.data.redaction.report import report_redaction  # needs torch

        memory_parts = parts[: 1 + (validation is not None)]
        report.redaction = report_redaction(redaction, chain(*(part.pairs for part in memory_parts)))
    report.skip_invalid = reading.skip_invalid
    if as_json:
        print_record(report.model_dump(), as_json, title="")
    else:
        print_data_report(report)
    return 0 if report.usable else 1


def _redaction(rules: Path | None) -> Redaction | None:
    if rules is None:
        return None
    from data_owner_client.data.redaction.rules import load_redaction

    return load_redaction(rules)


def _task(name: str | None) -> Task | None:
    if name is None:
        return None
    from data_owner_client.data.tasks import load_task

    return load_task(name)

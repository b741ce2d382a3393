"""Results on their way to files and standard output."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from data_owner_client.data.checking.report import counted
from data_owner_client.data.pair_files import origin_of
from data_owner_client.data.pairs import Source, source_record
from data_owner_client.data.reading.problems import Problems
from data_owner_client.runtime.atomic_files import is_replaceable, write_atomically
from data_owner_client.runtime.console import print_table
from data_owner_client.runtime.progress_display import stderr_reporter
from data_owner_client.runtime.resumable_output import ResumableOutput, one_line
from protocol import standard_streams
from protocol.errors import InvalidData

if TYPE_CHECKING:
    from data_owner_client.cli.doctor import Diagnosis
    from data_owner_client.decoding.generation import Generation
    from data_owner_client.decoding.token_choice import TokenChoice
    from data_owner_client.plm.tokenizer import PlmTokenizer
    from data_owner_client.training.sweep_results import SweepRow


def write_texts(
    inputs: Sequence[Source],
    run: Callable[..., Generation],
    identity: Sequence[object],
    output: Path | None,
    as_json: bool,
    explain: Path | None,
    tokenizer: PlmTokenizer,
    *,
    verbatim: bool,
    skip_invalid: bool,
) -> None:
    """Generate and write: to a file in parts that an interruption leaves behind, to standard output at the end.

    Each text is one line. With `verbatim`, a single text on standard output has the lines that it has. With
    `skip_invalid`, the line of a text that cannot be answered is empty, and their number is logged.
    """
    problems = Problems()
    if output is not None and is_replaceable(output) and not as_json and explain is None:
        from data_owner_client.decoding.stats import GenerationStats

        usage, reporter = GenerationStats(), stderr_reporter()

        def work(numbers: list[int]) -> dict[int, str]:
            nonlocal usage
            failed: set[int] = set()

            def on_failure(at: int, error: InvalidData) -> None:
                failed.add(at)
                problems.add(origin_of(inputs, numbers[at]), error)

            result = run([inputs[number] for number in numbers], on_failure=on_failure, reporter=reporter)
            usage += result.stats
            return {
                number: text
                for at, (number, text) in enumerate(zip(numbers, result.texts, strict=True))
                if at not in failed
            }

        try:
            keys = map(_key, inputs)
            before = ResumableOutput(output, identity).write(keys, work, reporter, skip_missing=skip_invalid)
        except InvalidData:
            problems.settle(len(inputs), skip=False)  # says more
            raise
        problems.settle(len(inputs), skip=True)
        done_before = f" ({before} of them done before)" if before else ""
        standard_streams.say(f"{counted(len(inputs), 'text')}{done_before}: {usage}.")
        return
    if skip_invalid:
        run = partial(run, on_failure=lambda number, error: problems.add(origin_of(inputs, number), error))
    result = run(inputs, reporter=stderr_reporter())
    problems.settle(len(inputs), skip=True)
    if explain is not None:
        write_atomically(explain, _explained(inputs, result, tokenizer).encode())
    if as_json:
        texts = [_json_record(source, number, result) for number, source in enumerate(inputs)]
        usage_record = vars(result.stats) | {"seconds": result.seconds}
        body = json.dumps({"texts": texts, "usage": usage_record}, ensure_ascii=False, indent=1) + "\n"
    else:
        whole = verbatim and output is None and len(inputs) == 1
        body = "".join(f"{text if whole else one_line(text)}\n" for text in result.texts)
    if output is None:
        sys.stdout.write(body)
        sys.stdout.flush()
    else:
        write_atomically(output, body.encode())
    if not as_json:
        standard_streams.say(f"{counted(len(inputs), 'text')}: {result.stats}.")


def _key(source: Source) -> str:
    """A text that only this source has; of a text, itself."""
    return source if isinstance(source, str) else json.dumps(source_record(source))


def _json_record(source: Source, number: int, result: Generation) -> dict[str, Any]:
    """The answer to one input: its text, and its probabilities of labels or its further texts if it has such."""
    best = result.best[number]
    record: dict[str, Any] = {"source": source_record(source), "text": best[0]}
    if result.label_probabilities is not None:
        return record | {"probabilities": result.label_probabilities[number]}
    return record | ({"best": best} if len(best) > 1 else {})


def json_line(record: dict[str, Any]) -> str:
    """The record as JSON on one line for every reader: line ends in its texts are escaped."""
    line = json.dumps(record, ensure_ascii=False)
    return line.translate({ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"})


def _explained(inputs: Sequence[Source], result: Generation, tokenizer: PlmTokenizer) -> str:
    """A JSON object a line for every input: its tokens, the distribution that each was chosen from, who wanted it."""

    def token(choice: TokenChoice) -> dict[str, Any]:
        return {
            "token": tokenizer.name(choice.token),
            "id": choice.token,
            "lambda": choice.lambda_t,
            "p": math.exp(choice.logprob),
            "p_plm": math.exp(choice.plm_logprob),
            "p_pema": None if choice.pema_logprob is None else math.exp(choice.pema_logprob),
            "plm_alone": tokenizer.name(choice.plm_token),
            "pema_alone": None if choice.pema_token is None else tokenizer.name(choice.pema_token),
        }

    records = [
        {"source": source_record(source), "text": text, "tokens": [token(choice) for choice in choices]}
        for source, text, choices in zip(inputs, result.texts, result.choices, strict=True)
    ]
    return "".join(f"{json_line(record)}\n" for record in records)


def stream_text(inputs: Sequence[Source], run: Callable[..., Generation]) -> None:
    """Show one text on standard output as it grows."""
    if len(inputs) != 1:
        raise InvalidData(f"--stream shows one text as it grows, and there are {len(inputs)}.", hint="Give one.")
    shown = 0

    def show(_: int, text: str) -> None:
        nonlocal shown
        sys.stdout.write(text[shown:])
        sys.stdout.flush()
        shown = len(text)

    show(0, run(inputs, on_text=show, reporter=None).texts[0])
    sys.stdout.write("\n")
    sys.stdout.flush()


def print_record(record: dict[str, Any], as_json: bool, *, title: str) -> None:
    """Show what a command found, as JSON or as a table."""
    if as_json:
        sys.stdout.write(json.dumps(record, ensure_ascii=False, indent=1) + "\n")
        return
    table = Table("", "", title=title, show_header=False)
    for key, value in record.items():
        text = "\n".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(key, f"{value:,.3f}" if isinstance(value, float) else text)
    print_table(table)


def print_diagnosis(diagnosis: Diagnosis, *, title: str) -> None:
    """Show what `doctor` found as a table."""
    table = Table("", "check", "found", "advice", title=title)
    for finding in diagnosis.findings:
        mark = Text("✓", "green") if finding.ok else Text("✗", "red")
        table.add_row(mark, finding.check, finding.detail, finding.advice)
    print_table(table)


def print_sweep(rows: Sequence[SweepRow], *, varied: Sequence[str]) -> None:
    """Show the likeliest interpolation of each training as a table.

    Args:
        rows: all points of the grid.
        varied: names of the settings with several values.
    """
    from data_owner_client.training.sweep_results import SETTINGS, likeliest

    # Besides the varied settings, those that a reader expects.
    shown = [name for name in SETTINGS if name in ("form", "rank") or name in varied]
    columns = (*shown, "examples", "schedule", "lambda_max", "nll", "train_seconds")
    table = Table(*columns, title=f"likeliest interpolation of each training; the PLM alone: {rows[0].plm_nll:.3f}")
    for row in likeliest(rows):
        values = map(row.value, columns)
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    print_table(table)

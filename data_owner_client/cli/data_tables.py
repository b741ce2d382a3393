"""The report of `pema-client data check` on standard output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from data_owner_client.data.checking.report import Cost, DataReport, Example, PartReport, RedactionReport, counted
from data_owner_client.data.redaction.rules import left_in_sources
from data_owner_client.runtime.console import PlainConsole, print_table

_CHARACTERS = 400
_LABELS = 5


def print_data_report(report: DataReport) -> None:
    """Show a report: what the files are, their lengths, what must be mended, and what it costs."""
    console = PlainConsole()
    for part in report.parts:
        console.print(f"{part.name}: {part.recognised}.", soft_wrap=True)
    print_table(_lengths(report.parts))
    for line in (*_repetitions(report), *_labels(report.parts), *report.warnings):
        console.print(line, soft_wrap=True)
    if report.redaction:
        _print_redaction(console, report.redaction)
    for number, example in enumerate(report.examples, 1):
        console.print(f"\nExample {number}{f' of the task {report.task}' if report.task else ''}:", soft_wrap=True)
        console.print(_marked(example), soft_wrap=True)
    if report.cost:
        console.print()
        for line in _costs(report.cost):
            console.print(line, soft_wrap=True)
    console.print()
    if report.problems:
        print_table(_problems(report))
    console.print(_conclusion(report))


def _conclusion(report: DataReport) -> str:
    if not report.usable:
        return "Mend this first." if report.skip_invalid else "Mend this first, or leave texts out with --skip-invalid."
    return "These texts are left out." if report.problems else "Nothing must be mended."


def _lengths(parts: Sequence[PartReport]) -> Table:
    table = Table("file", "", "median", "95 % are at most", "longest", title=f"lengths in {parts[0].unit}")
    for part in parts:
        source = "prompts" if part.unit == "tokens" else "sources"
        for noun, lengths in ((source, part.sources), ("targets", part.targets)):
            if lengths:
                numbers = (f"{number:,}" for number in (lengths.median, lengths.most, lengths.longest))
                table.add_row(part.name, noun, *numbers)
    return table


def _repetitions(report: DataReport) -> Iterator[str]:
    for part in report.parts:
        if part.duplicates.count:
            places = _places(part.name, part.duplicates.lines)
            yield f"Pairs that are there before: {part.duplicates.count:,} ({places})."
        if part.contradictions.count:
            places = _places(part.name, part.contradictions.lines)
            yield f"Sources that are there before with another target: {part.contradictions.count:,} ({places})."
        if part.late_answers:
            yield f"Prompts that show earlier answers of their conversation: {part.late_answers:,} in {part.name}."
    for overlap in report.overlaps:
        places = _places(overlap.first, overlap.lines)
        yield f"Sources of {overlap.first} that are in {overlap.second}, too: {overlap.count:,} ({places})."


def _labels(parts: Sequence[PartReport]) -> Iterator[str]:
    for part in parts:
        if part.labels:
            largest = list(part.labels.largest.items())[:_LABELS]
            more = ", …" if part.labels.labels > len(largest) else ""
            counts = ", ".join(f"{label} {count:,}" for label, count in largest)
            yield f"{part.name} has {counted(part.labels.labels, 'label')}: {counts}{more}."


def _places(name: str, lines: Sequence[int]) -> str:
    return f"{name}:{', '.join(map(str, lines))}"


def _print_redaction(console: PlainConsole, report: RedactionReport) -> None:
    where = "targets and sources" if report.sources else "targets"
    counts = ", ".join(f"{count:,} {kind}" for kind, count in report.spans.items()) or "nothing"
    console.print(
        f"Surrogates replace {counts}: {report.share:.1%} of the characters of {where}, in "
        f"{counted(report.pairs, 'pair')}. {left_in_sources(report.left_in_sources)}".rstrip(),
        soft_wrap=True,
    )
    if report.examples:
        table = Table("kind", "true", "surrogate", title="what the owner would see (with another key)")
        for example in report.examples:
            table.add_row(example.kind, _cut(example.text), _cut(example.surrogate))
        print_table(table)


def _marked(example: Example) -> Text:
    """The prompt, and behind it the target's tokens in brackets."""
    text = Text(_cut(example.prompt))
    for token in example.target:
        text.append("[", "dim")
        text.append(_cut(token).replace("\n", "\\n"), "bold green")
        text.append("]", "dim")
    return text


def _cut(text: str) -> str:
    half = _CHARACTERS // 2
    return text if len(text) <= _CHARACTERS else f"{text[:half]} … {text[-half:]}"


def _costs(cost: Cost) -> Iterator[str]:
    share = "" if cost.share_of_day is None else f", {cost.share_of_day:.1%} of your quota of a day"
    money = "" if cost.money is None else f", for {cost.money:,.2f}"
    left_out = (
        f" Left out: {counted(cost.left_out, 'answer')} whose prompt shows earlier ones." if cost.left_out else ""
    )
    yield (
        f"A {cost.context} memory of {counted(cost.examples, 'pair')} takes {cost.tokens:,} tokens{share}{money}, and "
        f"`train` {cost.target_tokens:,} rows of the LM head. Texts that `train` decodes come on top.{left_out}"
    )
    yield from cost.shortfalls


def _problems(report: DataReport) -> Table:
    table = Table("texts", "have", "first lines", "advice", title="texts that cannot be used")
    for problem in report.problems:
        places = _places(problem.name, problem.lines) + (", …" if problem.more else "")
        table.add_row(f"{problem.count:,}", problem.kind, places if problem.lines else problem.name, problem.hint)
    return table

"""Settings of reading files with texts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from cyclopts import Parameter

from protocol.errors import InvalidRequest

Format = Literal["jsonl", "json", "csv", "tsv", "text", "parquet"]


@dataclass(frozen=True, kw_only=True)
class ReadingSettings:
    """Settings of reading files with texts. They hold for all files of a command.

    Attributes:
        format: Format of the files. Default: from their names, or from their content where the name does not tell.
        source_field: Field or column of the source, such as en or translation.en; a number with --no-header. Default:
            from the form of the records.
        target_field: Field or column of the target. Default: from the form of the records.
        header: Tables begin with a line of column names.
        labels: Names of the labels of a classification, in the order of their numbers from 0, where a file has numbers.
            Several follow one --labels.
        skip_invalid: Leave out texts that cannot be used, and say how many there are. Where every text has its line of
            output, that line is then empty.
    """

    format: Format | None = None
    source_field: str | None = None
    target_field: str | None = None
    header: Annotated[bool, Parameter(negative="--no-header")] = True
    labels: Annotated[tuple[str, ...], Parameter(consume_multiple=1, allow_leading_hyphen=False)] = ()
    skip_invalid: bool = False

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in get_args(Format):
            raise InvalidRequest(f"format is {self.format!r}.", hint=f"Use one of {', '.join(get_args(Format))}.")
        if repeated := [label for label, count in Counter(self.labels).items() if count > 1]:
            raise InvalidRequest(f"labels has {repeated[0]!r} twice.", hint="Each number needs a name of its own.")


DEFAULT_READING = ReadingSettings()

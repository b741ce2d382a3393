"""The texts that options and arguments name."""

from __future__ import annotations

from pathlib import Path

from data_owner_client.data.pairs import Format, Pair, read_pairs, read_parallel
from protocol.errors import InvalidData


def pairs_of(
    input_file: Path | None,
    sources: Path | None,
    targets: Path | None,
    file_format: Format | None,
    *,
    source_field: str,
    target_field: str,
) -> list[Pair]:
    """The pairs of a file, or of two parallel ones.

    Raises:
        InvalidData: they were given in two ways, or only half.
    """
    if sources is not None and targets is not None and input_file is None:
        return read_parallel(sources, targets)
    if sources is not None or targets is not None:
        raise InvalidData("Texts were given in two ways, or only half.", hint="--input, or --sources with --targets.")
    return read_pairs(input_file or Path("-"), format=file_format, source_field=source_field, target_field=target_field)


def sources_of(
    texts: list[str] | None, input_file: Path | None, file_format: Format | None, source_field: str
) -> list[str]:
    """The source texts of the command line, or of a file.

    Raises:
        InvalidData: they were given in two ways.
    """
    if texts and input_file is not None:
        raise InvalidData("Texts were given in two ways.", hint="Give them as arguments or with --input.")
    if texts:
        return texts
    path = input_file or Path("-")
    kind = file_format or ("text" if str(path) == "-" else None)
    return [pair.source for pair in read_pairs(path, format=kind, source_field=source_field, need_targets=False)]

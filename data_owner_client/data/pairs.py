"""Pairs of texts: read from JSONL, TSV, CSV, text files or standard input, split and stored."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_owner_client.runtime.atomic_files import write_atomically
from protocol.errors import InvalidData

Format = Literal["jsonl", "tsv", "csv", "text"]
# Quotation marks have no meaning in TSV.
csv.register_dialect("tsv", delimiter="\t", quoting=csv.QUOTE_NONE)
_SUFFIXES: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".tsv": "tsv", ".csv": "csv", ".txt": "text"}


@dataclass(frozen=True)
class Pair:
    """A source text and its target.

    Attributes:
        source: the source text.
        target: the target text; None if there are only sources.
    """

    source: str
    target: str | None = None


def read_pairs(
    path: str | Path,
    *,
    format: Format | None = None,  # noqa: A002  (the usual name in such readers)
    source_field: str = "source",
    target_field: str = "target",
    need_targets: bool = True,
) -> list[Pair]:
    """Read pairs from a file, or from standard input if `path` is `-`.

    JSONL has one object a line. TSV and CSV have a header that names the two fields, or exactly two columns. Text has
    one source a line.

    Args:
        path: path of the file.
        format: format of the file; None to infer it from the suffix.
        source_field: name of the field or column with the source.
        target_field: name of the field or column with the target.
        need_targets: whether each pair must have a target; if False, targets are not read.

    Raises:
        InvalidData: the file is missing, empty, malformed, or has an empty text. The message names the line.
    """
    text = _read(path)
    kind = format or _SUFFIXES.get(Path(path).suffix.lower()) or ("jsonl" if str(path) == "-" else None)
    if kind is None:
        raise InvalidData(
            f"The format of {path} is not clear from its name.", hint="Say --format jsonl, tsv, csv or text."
        )
    if kind == "text":
        if need_targets:
            raise InvalidData(f"{path} has no targets.", hint="Give --sources and --targets, or a file with both.")
        return [Pair(_text(line, f"{path}:{number} is empty")) for number, line in enumerate(_lines(text), 1)]
    if kind == "jsonl":
        records: Iterable[tuple[int, dict[str, object]]] = _jsonl(text, path)
    else:
        records = _table(text, path, "tsv" if kind == "tsv" else "excel", source_field, target_field)
    fields = (source_field, target_field if need_targets else None)
    pairs = [_pair(record, *fields, label=f"{path}:{number}") for number, record in records]
    if not pairs:
        raise InvalidData(f"{path} is empty.", hint="Give at least one pair.")
    return pairs


def read_parallel(sources: str | Path, targets: str | Path) -> list[Pair]:
    """Read pairs from two text files, line by line.

    Raises:
        InvalidData: the files differ in length, or have an empty line.
    """
    source_lines, target_lines = read_lines(sources), read_lines(targets)
    if len(source_lines) != len(target_lines):
        raise InvalidData(
            f"{sources} has {len(source_lines)} lines and {targets} has {len(target_lines)}.",
            hint="Parallel files have the same number of lines.",
        )
    return [
        Pair(_text(source, f"{sources}:{number} is empty"), _text(target, f"{targets}:{number} is empty"))
        for number, (source, target) in enumerate(zip(source_lines, target_lines, strict=True), 1)
    ]


def read_lines(path: str | Path) -> list[str]:
    """Read the lines of a text file, including empty ones.

    Raises:
        InvalidData: the file cannot be read.
    """
    return _lines(_read(path))


def split_validation(pairs: Sequence[Pair], fraction: float, max_sources: int = 300) -> tuple[list[Pair], list[Pair]]:
    """Set some pairs aside for validation, at least one. A hash of the source decides, so equal sources stay together.

    Args:
        pairs: all pairs.
        fraction: share of the pairs to set aside, 0 to 1.
        max_sources: upper bound of the distinct sources that are set aside.

    Returns:
        The pairs to train on, and the pairs set aside.

    Raises:
        InvalidData: there are fewer than two distinct sources.
    """
    order = sorted({pair.source for pair in pairs}, key=lambda source: hashlib.sha256(source.encode()).digest())
    if len(order) < 2:
        raise InvalidData(f"{len(pairs)} pairs are too few to set some aside for validation.", hint="Give more pairs.")
    held_out = set(order[: max(1, min(max_sources, round(fraction * len(pairs)), len(order) // 2))])
    train = [pair for pair in pairs if pair.source not in held_out]
    return train, [pair for pair in pairs if pair.source in held_out]


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """Write pairs as JSONL, without changing the texts.

    Raises:
        InvalidData: the disk is full.
    """
    lines = [json.dumps({"source": pair.source, "target": pair.target}, ensure_ascii=False) + "\n" for pair in pairs]
    write_atomically(path, "".join(lines).encode())


def read_stored_pairs(path: Path) -> list[Pair]:
    """Read a file of `write_pairs`. An empty list if it is missing or damaged; callers compare the digest."""
    try:
        return [Pair(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError, TypeError, RecursionError):
        return []


def digest_pairs(pairs: Iterable[Pair]) -> str:
    """SHA-256 over the pairs, in order."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([pair.source, pair.target]).encode())
    return digest.hexdigest()


def _read(path: str | Path) -> str:
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
    except OSError as error:
        raise InvalidData(
            f"{path} cannot be read: {error.strerror}.", hint="Check the path; - is standard input."
        ) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidData(f"{path} is not UTF-8 at byte {error.start}.", hint="Convert it: iconv -t UTF-8.") from error


def _lines(text: str) -> list[str]:
    # Not splitlines(): texts may contain U+2028 and similar characters, which do not end a line of a file.
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _jsonl(text: str, path: str | Path) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidData(f"{path}:{number} is not JSON.", hint="JSONL has one object a line.") from error
        if not isinstance(record, dict):
            raise InvalidData(
                f"{path}:{number} is not a JSON object.", hint='For example {"source": "…", "target": "…"}.'
            )
        yield number, record


def _table(
    text: str, path: str | Path, dialect: Literal["tsv", "excel"], source_field: str, target_field: str
) -> Iterator[tuple[int, dict[str, object]]]:
    reader = csv.reader(io.StringIO(text, newline=""), dialect)
    header: list[str] | None = None
    try:
        for row in reader:
            if not row:
                continue
            if header is None:
                has_header = source_field in row
                header = row if has_header else [source_field, target_field]
                if has_header:
                    continue
            if header == [source_field, target_field] and len(row) != 2:
                raise InvalidData(
                    f"{path}:{reader.line_num} has {len(row)} columns and no header names {source_field!r}.",
                    hint="Give a header line with both field names, or exactly two columns.",
                )
            yield reader.line_num, dict(zip(header, row, strict=False))
    except csv.Error as error:
        raise InvalidData(
            f"{path}:{reader.line_num} is not well-formed: {error}.", hint="Is a quotation mark missing?"
        ) from error


def _pair(record: dict[str, object], source_field: str, target_field: str | None, *, label: str) -> Pair:
    source = _field(record, source_field, label)
    return Pair(source, None if target_field is None else _field(record, target_field, label))


def _field(record: dict[str, object], name: str, label: str) -> str:
    hint = "Name the fields with --source-field and --target-field."
    return _text(record.get(name), f"{label} has no text in the field {name!r}", hint)


def _text(value: object, complaint: str, hint: str = "Every line needs a text.") -> str:
    if not isinstance(value, str) or not value.strip():
        raise InvalidData(f"{complaint}.", hint=hint)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidData(
            f"{complaint} that can be encoded: it has half of a surrogate pair.", hint="Write it as Unicode text."
        ) from None
    return value.strip()

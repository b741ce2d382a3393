"""Reading the data owner's own texts: JSONL, TSV, CSV, two parallel text files, standard input."""

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
# A quotation mark means nothing in TSV.
csv.register_dialect("tsv", delimiter="\t", quoting=csv.QUOTE_NONE)
_SUFFIXES: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".tsv": "tsv", ".csv": "csv", ".txt": "text"}


@dataclass(frozen=True)
class Pair:
    """A source text and its target; the target is None where only sources are given."""

    source: str
    target: str | None = None


def read_pairs(
    path: str | Path,
    *,
    format: Format | None = None,  # noqa: A002  (the name that every such reader uses)
    source_field: str = "source",
    target_field: str = "target",
    need_targets: bool = True,
) -> list[Pair]:
    """Pairs from a file, or from standard input if `path` is `-`.

    JSONL has one object a line; TSV and CSV have a header that names the two fields, or else exactly two columns; text
    has one source a line. The format follows from the file's suffix unless given.

    Raises:
        InvalidData: the file is missing, empty, not in its format, or has an empty text; the message names the line.
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
    pairs = [_pair(record, *fields, place=f"{path}:{number}") for number, record in records]
    if not pairs:
        raise InvalidData(f"{path} is empty.", hint="Give at least one pair.")
    return pairs


def read_parallel(sources: str | Path, targets: str | Path) -> list[Pair]:
    """Pairs from two text files, line by line.

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
    """The lines of a text file, empty ones included.

    Raises:
        InvalidData: the file cannot be read.
    """
    return _lines(_read(path))


def split_validation(pairs: Sequence[Pair], fraction: float, most: int = 300) -> tuple[list[Pair], list[Pair]]:
    """Set aside a part of the pairs for validation, at least one, by a hash of the source: equal texts stay together.

    Args:
        pairs: all pairs.
        fraction: share of the pairs to set aside, 0 to 1.
        most: at most so many distinct sources.

    Raises:
        InvalidData: nothing would be left on one side.
    """
    order = sorted({pair.source for pair in pairs}, key=lambda source: hashlib.sha256(source.encode()).digest())
    if len(order) < 2:
        raise InvalidData(f"{len(pairs)} pairs are too few to set some aside for validation.", hint="Give more pairs.")
    held_out = set(order[: max(1, min(most, round(fraction * len(pairs)), len(order) // 2))])
    train = [pair for pair in pairs if pair.source not in held_out]
    return train, [pair for pair in pairs if pair.source in held_out]


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """Pairs as JSONL, as they are.

    Raises:
        InvalidData: the disk is full.
    """
    lines = [json.dumps({"source": pair.source, "target": pair.target}, ensure_ascii=False) + "\n" for pair in pairs]
    write_atomically(path, "".join(lines).encode())


def read_stored_pairs(path: Path) -> list[Pair]:
    """What `write_pairs` wrote; nothing if that is not there, or damaged: its digest tells."""
    try:
        return [Pair(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError, TypeError, RecursionError):
        return []


def digest_pairs(pairs: Iterable[Pair]) -> str:
    """SHA-256 over the pairs in their order."""
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
    # Not splitlines(): texts may hold U+2028 and the like, which end no line of a file.
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
                named = source_field in row
                header = row if named else [source_field, target_field]
                if named:
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


def _pair(record: dict[str, object], source_field: str, target_field: str | None, *, place: str) -> Pair:
    source = _field(record, source_field, place)
    return Pair(source, None if target_field is None else _field(record, target_field, place))


def _field(record: dict[str, object], name: str, place: str) -> str:
    hint = "Name the fields with --source-field and --target-field."
    return _text(record.get(name), f"{place} has no text in the field {name!r}", hint)


def _text(value: object, complaint: str, hint: str = "Every line needs a text.") -> str:
    if not isinstance(value, str) or not value.strip():
        raise InvalidData(f"{complaint}.", hint=hint)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidData(
            f"{complaint} that can be encoded: half of a surrogate pair.", hint="Write it as Unicode text."
        ) from None
    return value.strip()

"""Pairs on disk: JSON lines that are read as they are needed, so that they may be larger than memory."""

from __future__ import annotations

import json
import tempfile
import threading
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, overload

from data_owner_client.data.pairs import Pair, Source, digest_pairs, further_fields, pair_of
from data_owner_client.data.reading.problems import Origin, text_origin
from data_owner_client.runtime.atomic_files import open_atomically
from protocol.errors import InvalidData

# Pairs that are read from the disk, or written to it, at a time.
_BLOCK = 512


class PairFile(Sequence[Pair]):
    """Pairs in a file of JSON lines. In memory are twelve bytes for each of them.

    Args:
        file: open file that holds the lines alone; closed with this object.
        start_N: byte offset of each line, and of the end of the file.
        name: name of the user's file that the pairs were read from; None if there is none.
        line_N: line of each pair in the user's file.
    """

    def __init__(
        self, file: IO[bytes], start_N: array[int], *, name: str | None = None, line_N: array[int] | None = None
    ) -> None:
        self._file = file
        self._start_N = start_N
        self._name = name
        self._line_N = array("I") if line_N is None else line_N
        self._lock = threading.Lock()  # a position belongs to the file, and a build reads from several threads
        weakref.finalize(self, file.close)

    @classmethod
    def spool(cls, pairs: Iterable[Pair], name: str | None = None) -> PairFile:
        """Write pairs to a temporary file, which nobody else sees, and which is gone with this object.

        Args:
            pairs: pairs, of which one block at a time is in memory.
            name: name of the file that all pairs have in their origins; None to forget the origins.

        Raises:
            InvalidData: the disk is full.
        """
        start_N, line_N = array("Q", [0]), array("I")
        pairs = iter(pairs)
        # Closed with the object.
        file = tempfile.TemporaryFile()  # noqa: SIM115
        spooled = cls(file, start_N, name=name, line_N=line_N)
        while block := list(islice(pairs, _BLOCK)):
            lines = list(map(_line, block))
            try:
                file.write(b"".join(lines))
            except OSError as error:
                raise InvalidData(
                    f"{tempfile.gettempdir()} cannot hold the texts: {error.strerror}.",
                    hint="Make room, or set TMPDIR to a folder on a larger disk.",
                ) from error
            for line in lines:
                start_N.append(start_N[-1] + len(line))
            line_N.extend(pair.origin.number if pair.origin else 0 for pair in block)
        return spooled

    @classmethod
    def open(cls, path: Path) -> PairFile:
        """Open a file of `write_pairs`.

        Raises:
            OSError: it cannot be read.
        """
        file = path.open("rb")
        pairs = cls(file, array("Q", [0]))
        for line in file:
            pairs._start_N.append(pairs._start_N[-1] + len(line))
        return pairs

    def __len__(self) -> int:
        return len(self._start_N) - 1

    def __iter__(self) -> Iterator[Pair]:
        for start in range(0, len(self), _BLOCK):
            yield from self._read(start, min(start + _BLOCK, len(self)))

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | Sequence[Pair]:
        numbers = range(len(self))[index]
        if isinstance(numbers, int):
            (pair,) = self._read(numbers, numbers + 1)
            return pair
        if numbers.step == 1:
            return self._read(numbers.start, max(numbers.start, numbers.stop))
        return [self[number] for number in numbers]

    def _read(self, start: int, stop: int) -> list[Pair]:
        with self._lock:
            self._file.seek(self._start_N[start])
            data = self._file.read(self._start_N[stop] - self._start_N[start])
        lines = data.split(b"\n")[: stop - start]
        return [self._pair(line, number) for number, line in enumerate(lines, start)]

    def _pair(self, line: bytes, number: int) -> Pair:
        origin = Origin(self._name, self._line_N[number]) if self._name is not None else None
        return pair_of(json.loads(line), origin)


class Questions(Sequence[Source]):
    """The texts and conversations that the pairs of a sequence answer, which stay where they are."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[Source]:
        return (pair.question for pair in self._pairs)

    def origin(self, index: int) -> Origin | None:
        """Position of a text in its file; None if it comes from none."""
        return self._pairs[index].origin

    @overload
    def __getitem__(self, index: int) -> Source: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Source]: ...
    def __getitem__(self, index: int | slice) -> Source | Sequence[Source]:
        found = self._pairs[index]
        return found.question if isinstance(found, Pair) else Questions(found)


def origin_of(texts: Sequence[object], index: int) -> Origin:
    """Position of a text: its line, or its number if it comes from no file."""
    return (texts.origin(index) if isinstance(texts, Questions) else None) or text_origin(index)


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """Write pairs as JSONL, without changing the texts.

    Raises:
        InvalidData: the disk is full.
    """
    with open_atomically(path) as file:
        for pair in pairs:
            file.write(_line(pair))


def read_stored_pairs(path: Path, digest: str) -> Sequence[Pair] | None:
    """Pairs of a file of `write_pairs`, read as they are needed.

    Args:
        path: path of the file.
        digest: digest that the pairs must have (`digest_pairs`).

    Returns:
        The pairs; None if the file is missing or damaged, or holds other pairs.
    """
    try:
        pairs = PairFile.open(path)
        return pairs if digest_pairs(pairs) == digest else None
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None


def _line(pair: Pair) -> bytes:
    record = {"source": pair.source, "target": pair.target} | further_fields(pair)
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"

"""Lines of the user's files: compression, encoding, line ends."""

from __future__ import annotations

import codecs
import gzip
import io
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from data_owner_client.runtime.arguments import to_path
from protocol.errors import InvalidData

_STANDARD_INPUT = "-"
# Bytes that are looked at to tell compression, encoding and format.
_HEAD_BYTES = 2**16
# Characters of one line. A text of this length has more tokens than any model takes.
MAX_LINE = 2**24
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_UTF_32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_GZIP = b"\x1f\x8b"
_PARQUET = b"PAR1"
# First bytes of files that are no texts, and what to do with them.
_OTHER_FILES = {
    b"PK\x03\x04": ("a ZIP archive or a workbook", "Unpack it; save a workbook as CSV (UTF-8)."),
    b"\xd0\xcf\x11\xe0": ("an old Office document", "Save it as CSV (UTF-8)."),
    b"%PDF": ("a PDF document", "Give its text."),
    b"BZh": ("compressed by bzip2", "Unpack it, or pack it with gzip."),
    b"\xfd7zXZ": ("compressed by xz", "Unpack it, or pack it with gzip."),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "Unpack it, or pack it with gzip."),
}


@dataclass(frozen=True)
class Source:
    """A file with texts, opened.

    Attributes:
        name: the path as the user gave it, or `standard input`.
        head: beginning of the text, of some thousand characters at most.
        text: the whole text, without its byte-order mark. Bytes that are no text of the encoding are lone surrogates.
        gzipped: whether it was unpacked.
    """

    name: str
    head: str
    text: IO[str]
    gzipped: bool = False

    def lines(self) -> Iterator[tuple[int, str]]:
        r"""Number and text of each line, with its line end, which is LF, CRLF, or CR in a file without LF.

        Other characters end no line: texts may contain U+2028 and the like.

        Raises:
            InvalidData: the file cannot be read to its end, or a line is too long for a text.
        """
        number = 0
        while True:
            number += 1
            with _readable(self.name, number):
                line = self.text.readline(MAX_LINE)
            if not line:
                return
            if len(line) == MAX_LINE:
                raise InvalidData(
                    f"{self.name}:{number} has more than {MAX_LINE:,} characters.", hint="Give one text on each line."
                )
            yield number, line

    def read(self, count: int) -> str:
        """Some more characters of the text; "" at its end.

        Raises:
            InvalidData: the file cannot be read to its end.
        """
        with _readable(self.name):
            return self.text.read(count)


@dataclass(frozen=True)
class BinaryFile:
    """A file, opened, without gzip's packing.

    Attributes:
        name: the path as the user gave it, or `standard input`.
        head: its first bytes.
        data: the whole file.
        gzipped: whether it was unpacked.
    """

    name: str
    head: bytes
    data: IO[bytes]
    gzipped: bool

    @property
    def is_parquet(self) -> bool:
        """True if it is a Parquet file, by its first bytes."""
        return self.head.startswith(_PARQUET)

    @contextmanager
    def seekable(self) -> Iterator[IO[bytes]]:
        """The whole file as a temporary one, in which a reader can go back and forth.

        Raises:
            InvalidData: the file cannot be read to its end, or the disk is full.
        """
        with tempfile.TemporaryFile() as copy:
            with _readable(self.name):
                shutil.copyfileobj(self.data, copy)
            copy.seek(0)
            yield copy


@contextmanager
def open_binary(path: str | Path) -> Iterator[BinaryFile]:
    """Open a file, or standard input if `path` is `-`. It may be gzipped.

    Raises:
        InvalidData: the file cannot be opened, or is of a kind that has no texts.
    """
    name = display_name(path)
    with _readable(name):
        raw = _standard_input() if str(path) == _STANDARD_INPUT else to_path(path).open("rb")
    try:
        with _readable(name):
            data = _Peekable(raw)
            if gzipped := data.head.startswith(_GZIP):
                data = _Peekable(gzip.GzipFile(fileobj=io.BufferedReader(data)))
        for magic, (what, hint) in _OTHER_FILES.items():
            if data.head.startswith(magic):
                raise InvalidData(f"{name} is {what}.", hint=hint)
        yield BinaryFile(name, data.head, cast(IO[bytes], data), gzipped)
    finally:
        if str(path) != _STANDARD_INPUT:
            raw.close()


@contextmanager
def open_text(path: str | Path) -> Iterator[Source]:
    """Open a file, or standard input if `path` is `-`. It is UTF-8, or has a byte-order mark, and may be gzipped.

    Raises:
        InvalidData: the file cannot be opened, or is no text.
    """
    with open_binary(path) as file, text_of(file) as source:
        yield source


@contextmanager
def text_of(file: BinaryFile) -> Iterator[Source]:
    """The text of a file.

    Raises:
        InvalidData: it is no text.
    """
    name, head = file.name, file.head
    if file.is_parquet:
        raise InvalidData(f"{name} is a Parquet file.", hint="Give a text file, with one text a line.")
    encoding, errors = _encoding(head)
    if encoding == "utf-8-sig" and b"\0" in head:
        raise InvalidData(f"{name} has NUL bytes.", hint="Is it UTF-16? Convert it: iconv -f UTF-16 -t UTF-8.")
    with _readable(name):
        beginning = codecs.getincrementaldecoder(encoding)(errors).decode(head)
    newline = "\r" if "\r" in beginning and "\n" not in beginning else "\n"
    text = io.TextIOWrapper(io.BufferedReader(cast(io.RawIOBase, file.data)), encoding, errors, newline=newline)
    try:
        yield Source(name, beginning, text, file.gzipped)
    finally:
        text.detach()


def display_name(path: str | Path) -> str:
    """The name of a file in messages."""
    return "standard input" if str(path) == _STANDARD_INPUT else str(path)


class _Peekable(io.RawIOBase):
    """A stream of bytes whose beginning can be looked at, also of pipes."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile) -> None:
        self._stream = stream
        self.head = stream.read(_HEAD_BYTES)
        self._rest = self.head

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._rest[: len(buffer)] or self._stream.read(len(buffer))
        self._rest = self._rest[len(data) :]
        buffer[: len(data)] = data
        return len(data)


def _standard_input() -> IO[bytes]:
    if sys.stdin is None:
        raise InvalidData("Standard input is closed.", hint="Give a file.")
    return sys.stdin.buffer


def _encoding(head: bytes) -> tuple[str, str]:
    """The encoding and the error handler, under which every sequence of bytes is decoded and faults stay visible."""
    if head.startswith(_UTF_32):
        return "utf-32", "surrogatepass"
    if head.startswith(_UTF_16):
        return "utf-16", "surrogatepass"
    return "utf-8-sig", "surrogateescape"


@contextmanager
def _readable(name: str, number: int | None = None) -> Iterator[None]:
    place = name if number is None else f"{name}:{number}"
    try:
        yield
    except UnicodeError as error:
        raise InvalidData(
            f"{place} has bytes that are no text of its encoding.", hint="Is the file whole? Save it as UTF-8."
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InvalidData(f"{place} is damaged: it cannot be unpacked.", hint="Check it: gzip --test.") from error
    except OSError as error:
        reason = error.strerror or "it is no file"
        raise InvalidData(f"{name} cannot be read: {reason}.", hint="Check the path; - is standard input.") from error

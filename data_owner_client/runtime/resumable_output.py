"""Output files of long work: results are stored as they arrive, and an interrupted command resumes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

from data_owner_client.runtime.atomic_files import open_atomically
from data_owner_client.runtime.progress import Reporter
from protocol.errors import InvalidData

# Texts between two writes to the disk; enough to keep batches full.
_TEXTS_PER_WRITE = 256


def one_line(text: str) -> str:
    """The text as one line for every reader: a space for each line end that `str.splitlines` knows.

    Besides the newline these are carriage return, vertical tab, form feed, U+001C to U+001E, U+0085, U+2028 and U+2029.
    """
    return " ".join(text.splitlines())


class ResumableOutput:
    """A file with one line of output for each text.

    Until all texts have a result, the results are stored in a file beside it, one JSON record a line. In memory are
    numbers alone, so that the results may be larger.

    Args:
        output: path of the file.
        identity: JSON-serialisable value of everything that decides a result. Records with another identity are
            ignored.
    """

    def __init__(self, output: Path, identity: object) -> None:
        self._output = output
        self._records = output.with_name(f".{output.name}.partial")
        self._identity = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()

    def write(
        self,
        texts: Iterable[str],
        work: Callable[[list[int]], dict[int, str]],
        reporter: Reporter | None = None,
        *,
        skip_missing: bool = False,
    ) -> int:
        """Compute the missing results and write the file.

        Results belong to a text, not to a line number, so a corrected text does not invalidate its neighbours.

        Args:
            texts: all texts, in the order of the output lines.
            work: computes the results for some indices of `texts`. Indices without a result are tried again by the next
                call of `write`.
            reporter: shows the progress; None for none.
            skip_missing: leave the line of a text without a result empty; if False, such a text is an error.

        Returns:
            The number of texts that had a result before.

        Raises:
            InvalidData: the disk is full, or some texts have no result, so that the file is not written.
        """
        keys = [hashlib.sha256(text.encode()).digest() for text in texts]
        done = self._stored_results()
        before = sum(key in done for key in keys)
        with (reporter or Reporter()).bar(self._output.name, len(keys), "texts", done=before) as bar:
            for numbers in _runs([number for number, key in enumerate(keys) if key not in done]):
                answers = work(numbers)
                done |= self._store({keys[number]: text for number, text in answers.items()})
                bar.advance(len(answers))
        missing = [number for number, key in enumerate(keys) if key not in done]
        if missing and not skip_missing:
            raise InvalidData(
                f"{len(missing)} of {len(keys)} texts have no answer, text {missing[0] + 1} for one; the others are "
                "stored.",
                hint="Correct them, or run the same command again.",
            )
        with open_atomically(self._output) as file:
            for text in self._results([done.get(key) for key in keys]):
                file.write(f"{one_line(text)}\n".encode())
        self._records.unlink(missing_ok=True)
        return before

    def _stored_results(self) -> dict[bytes, int]:
        """Byte offsets of the stored records, by the digest of their text."""
        done: dict[bytes, int] = {}
        with suppress(OSError), self._records.open("rb") as file:
            start = 0
            for line in file:  # some may be empty or incomplete
                with suppress(ValueError, KeyError, TypeError, RecursionError):
                    record = json.loads(line)
                    if record["job"] == self._identity and isinstance(record["text"], str):
                        done[bytes.fromhex(record["source"])] = start
                start += len(line)
        return done

    def _results(self, places: Sequence[int | None]) -> Iterator[str]:
        """The stored results at these byte offsets; an empty text for None."""
        with self._records.open("rb") if any(place is not None for place in places) else nullcontext() as file:
            for place in places:
                if file is None or place is None:
                    yield ""
                else:
                    file.seek(place)
                    yield json.loads(file.readline())["text"]

    def _store(self, results: dict[bytes, str]) -> dict[bytes, int]:
        """Store results; return the byte offsets of their records."""
        places: dict[bytes, int] = {}
        try:
            self._records.parent.mkdir(parents=True, exist_ok=True)
            with self._records.open("ab") as file:
                file.write(b"\n")  # a kill may have left an incomplete line
                for key, text in results.items():
                    places[key] = file.tell()
                    record = {"job": self._identity, "source": key.hex(), "text": text}
                    file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InvalidData(
                f"{self._records} cannot be written: {error.strerror}.", hint="Make room, then run this again."
            ) from error
        return places


def _runs(numbers: Sequence[int]) -> Iterator[list[int]]:
    for start in range(0, len(numbers), _TEXTS_PER_WRITE):
        yield list(numbers[start : start + _TEXTS_PER_WRITE])

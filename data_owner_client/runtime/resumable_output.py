"""Output files of long work: results are stored as they arrive, and an interrupted command resumes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data_owner_client.runtime.atomic_files import write_atomically
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

    Until all texts have a result, the results are stored in a file beside it, one JSON record a line.

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
        texts: Sequence[str],
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
        keys = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        done = self._stored_results()
        before = sum(key in done for key in keys)
        with (reporter or Reporter()).bar(self._output.name, len(texts), "texts", done=before) as bar:
            for numbers in _runs([number for number, key in enumerate(keys) if key not in done]):
                answers = work(numbers)
                results = {keys[number]: text for number, text in answers.items()}
                self._store(results)
                done |= results
                bar.advance(len(answers))
        missing = [number for number, key in enumerate(keys) if key not in done]
        if missing and not skip_missing:
            raise InvalidData(
                f"{len(missing)} of {len(texts)} texts have no answer, text {missing[0] + 1} for one; the others are "
                "stored.",
                hint="Correct them, or run the same command again.",
            )
        write_atomically(self._output, "".join(f"{one_line(done.get(key, ''))}\n" for key in keys).encode())
        self._records.unlink(missing_ok=True)
        return before

    def _stored_results(self) -> dict[str, str]:
        try:
            lines = self._records.read_bytes().split(b"\n")
        except OSError:
            return {}
        done: dict[str, str] = {}
        for line in lines:  # some may be empty or incomplete
            try:
                record = json.loads(line)
                if record["job"] == self._identity and isinstance(record["text"], str):
                    done[record["source"]] = record["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        return done

    def _store(self, results: dict[str, str]) -> None:
        lines = [
            json.dumps({"job": self._identity, "source": key, "text": text}, ensure_ascii=False) + "\n"
            for key, text in results.items()
        ]
        try:
            self._records.parent.mkdir(parents=True, exist_ok=True)
            with self._records.open("a", encoding="utf-8") as file:
                # Begin a new line: a kill may have left an incomplete one.
                file.write("\n" + "".join(lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InvalidData(
                f"{self._records} cannot be written: {error.strerror}.", hint="Make room, then run this again."
            ) from error


def _runs(numbers: Sequence[int]) -> Iterator[list[int]]:
    for start in range(0, len(numbers), _TEXTS_PER_WRITE):
        yield list(numbers[start : start + _TEXTS_PER_WRITE])

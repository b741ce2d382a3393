"""Long work on many texts, kept on disk as it comes: interrupted, the same command goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data_owner_client.runtime.atomic_files import write_atomically
from protocol.errors import InvalidData

# Texts that are worked on between two looks at the disk. Large enough that batches stay full.
_TEXTS_AT_ONCE = 256


class ResumableOutput:
    """Texts that become lines of a file.

    What is done lies beside the file, one JSON record a line, until all is.

    Args:
        output: the file.
        identity: all that decides what a text becomes; records of another job are not taken over.
    """

    def __init__(self, output: Path, identity: object) -> None:
        self._output = output
        self._records = output.with_name(f".{output.name}.partial")
        self._identity = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()

    def run(self, texts: Sequence[str], work: Callable[[list[int]], dict[int, str]]) -> int:
        """Do what is not done, and write the file; the number of texts that were done before.

        Texts are known by themselves, not by their place: those around one that is mended need not be done again.

        Args:
            texts: all of them.
            work: gives the results for some of their numbers. What it leaves out is tried again the next time.

        Raises:
            InvalidData: the disk is full; or some texts have no result, so the file is not written.
        """
        keys = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        done = self._done()
        before = sum(key in done for key in keys)
        for numbers in _runs([number for number, key in enumerate(keys) if key not in done]):
            results = {keys[number]: text for number, text in work(numbers).items()}
            self._keep(results, begin=not done)
            done |= results
        missing = [number for number, key in enumerate(keys) if key not in done]
        if missing:
            raise InvalidData(
                f"{len(missing)} of {len(texts)} texts have no answer, text {missing[0] + 1} for one; the others are "
                "kept.",
                hint="Mend them, or run the same command again.",
            )
        write_atomically(self._output, "".join(done[key] + "\n" for key in keys).encode())
        self._records.unlink(missing_ok=True)
        return before

    def _done(self) -> dict[str, str]:
        try:
            lines = self._records.read_bytes().split(b"\n")
        except OSError:
            return {}
        done: dict[str, str] = {}
        for line in lines:  # some may be empty, or halves
            try:
                record = json.loads(line)
                if record["job"] == self._identity and isinstance(record["text"], str):
                    done[record["source"]] = record["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        return done

    def _keep(self, results: dict[str, str], *, begin: bool) -> None:
        lines = [
            json.dumps({"job": self._identity, "source": key, "text": text}, ensure_ascii=False) + "\n"
            for key, text in results.items()
        ]
        try:
            self._records.parent.mkdir(parents=True, exist_ok=True)
            with self._records.open("w" if begin else "a", encoding="utf-8") as file:
                # On a line of its own, also behind half of one that a kill has left.
                file.write("\n" + "".join(lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InvalidData(
                f"{self._records} cannot be written: {error.strerror}.", hint="Make room, then run this again."
            ) from error


def _runs(numbers: Sequence[int]) -> Iterator[list[int]]:
    for start in range(0, len(numbers), _TEXTS_AT_ONCE):
        yield list(numbers[start : start + _TEXTS_AT_ONCE])

"""LM heads on disk: downloaded once, in chunks of rows, and identified by their digest."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from data_owner_client.runtime.atomic_files import write_atomically
from data_owner_client.runtime.progress import Reporter
from protocol.codec import raw_bytes
from protocol.errors import InvalidData, InvalidRequest, ProtocolViolation
from protocol.head import LMHead
from protocol.messages import DTYPES, HeadRows, ModelCard

# Bytes of one chunk: the loss when a connection breaks, and the memory that is needed at a time.
_CHUNK_BYTES = 16 * 2**20
_COMPLETE, _CHUNKS = "complete", "rows-*-*.safetensors"
_SPAN = re.compile(r"rows-([0-9]{1,18})-([0-9]{1,18})\.safetensors")


class CachedHead:
    """The LM head of one model in a folder, possibly incomplete.

    Args:
        folder: folder with the heads of all models.
        card: card of the model; its `head_digest` names the subfolder.
    """

    def __init__(self, folder: Path, card: ModelCard) -> None:
        self.folder = folder / card.head_digest
        self._card = card

    @property
    def rows(self) -> int:
        """Number of rows that are stored without a gap, from the first."""
        return sum(stop - start for start, stop in self._spans())

    @property
    def complete(self) -> bool:
        """True if all rows are stored and have been checked against the digest."""
        return (self.folder / _COMPLETE).exists() and self.rows == self._card.vocab_size

    def fetch(self, request: Callable[[int, int], HeadRows], reporter: Reporter | None = None) -> None:
        """Download the missing rows, then check all of them. Resumes an interrupted download.

        Args:
            request: returns the rows of a range [start, stop), in the model's own dtype.
            reporter: receives the progress; None for no reports.

        Raises:
            ProtocolViolation: the rows do not match the digest; they are deleted.
            InvalidData: the disk is full, or a chunk was damaged.
        """
        with self._exclusive_access():
            if self.complete:
                return
            card, done = self._card, self.rows
            row_bytes = card.hidden_size * DTYPES[card.head_dtype].itemsize
            step = max(1, min(card.limits.max_head_rows, _CHUNK_BYTES // row_bytes))
            with (reporter or Reporter()).bar("LM head", card.vocab_size, "rows", done=done) as bar:
                for start in range(done, card.vocab_size, step):
                    stop = min(start + step, card.vocab_size)
                    write_atomically(self._path(start, stop), request(start, stop).to_bytes())
                    bar.advance(stop - start)
            self.verify()
            write_atomically(self.folder / _COMPLETE, b"")

    def verify(self) -> None:
        """Check all rows against the digest.

        The digest of a rotated head is not computed from its rows, so only their number is checked.

        Raises:
            ProtocolViolation: the rows do not match the digest; they are deleted.
            InvalidData: rows are missing, or a chunk is damaged.
        """
        digest, biases, head = hashlib.sha256(), list[Tensor](), None
        for chunk in self._chunks():
            head = chunk.head()
            digest.update(raw_bytes(head.weight_V_D))
            biases += [] if head.bias_V is None else [head.bias_V]
        for bias_N in biases:
            digest.update(raw_bytes(bias_N))
        if head is not None:
            digest.update(head.trailer())
        if not self._card.rotated and digest.hexdigest() != self._card.head_digest:
            for path in (self.folder / _COMPLETE, *self.folder.glob(_CHUNKS)):
                path.unlink(missing_ok=True)
            raise ProtocolViolation(
                "The rows of the LM head do not match its digest; they were deleted.",
                hint="Run this again. If it happens again, ask the owner.",
            )

    def load(self) -> LMHead:
        """Read the head in the model's own dtype. Needs memory for V × D values and one chunk.

        Raises:
            InvalidData: rows are missing, or a chunk is damaged.
        """
        card = self._card
        weight_V_D = torch.empty(card.vocab_size, card.hidden_size, dtype=DTYPES[card.head_dtype])
        biases, at = list[Tensor](), 0
        for chunk in self._chunks():
            weight_V_D[at : at + len(chunk.weight_N_D)] = chunk.weight_N_D
            biases += [] if chunk.bias_N is None else [chunk.bias_N]
            at += len(chunk.weight_N_D)
        if biases and sum(map(len, biases)) != at:
            raise InvalidData(f"{self.folder} holds rows of several heads.", hint="Delete the folder.")
        return LMHead(weight_V_D, torch.cat(biases) if biases else None, chunk.logit_scale, chunk.softcap)

    @contextmanager
    def _exclusive_access(self) -> Iterator[None]:
        lock = FileLock(self.folder / ".lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise InvalidData(
                f"{self.folder} cannot be written to: {error.strerror}.",
                hint="Check the folder's permissions and the space on the disk.",
            ) from error
        try:
            yield
        finally:
            lock.release()

    def _spans(self) -> Iterator[tuple[int, int]]:
        """Ranges of the stored chunks without a gap, from the first row."""
        stop_of: dict[int, int] = {}
        for path in self.folder.glob(_CHUNKS):
            if (span := _SPAN.fullmatch(path.name)) is not None and int(span[1]) < int(span[2]):
                start, stop = int(span[1]), int(span[2])
                stop_of[start] = max(stop, stop_of.get(start, 0))
        at = 0
        while at in stop_of:
            yield at, stop_of[at]
            at = stop_of[at]

    def _chunks(self) -> Iterator[HeadRows]:
        """All chunks, from the first row to the last."""
        spans = list(self._spans())
        if not spans or spans[-1][1] != self._card.vocab_size:
            raise InvalidData(f"{self.folder} does not hold all rows.", hint="Fetch them: pema-client fetch-head.")
        for start, stop in spans:
            path = self._path(start, stop)
            try:
                chunk = HeadRows.from_bytes(path.read_bytes())
                self._check(chunk, stop - start)
            except (OSError, InvalidRequest, ValueError) as error:
                path.unlink(missing_ok=True)
                raise InvalidData(f"{path} was damaged, and was deleted.", hint="Run this again.") from error
            yield chunk

    def _check(self, chunk: HeadRows, rows: int) -> None:
        """Refuse a chunk that does not have `rows` rows of this head.

        Raises:
            ValueError: the chunk belongs to another head, or has another number of rows.
        """
        head, dtype = chunk.head(), DTYPES[self._card.head_dtype]
        if head.weight_V_D.shape != (rows, self._card.hidden_size) or any(part.dtype != dtype for part in head.parts()):
            raise ValueError("a chunk of another head")
        if head.bias_V is not None and len(head.bias_V) != rows:
            raise ValueError("a bias of another length")

    def _path(self, start: int, stop: int) -> Path:
        return self.folder / f"rows-{start}-{stop}.safetensors"

"""LM heads on disk. They are large, so they come in pieces, are fetched once, and are known by their digest."""

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

# Bytes of one piece: what a cut connection may cost, and what is in memory at a time.
_PIECE_BYTES = 16 * 2**20
_COMPLETE, _PIECES = "complete", "rows-*-*.safetensors"
_SPAN = re.compile(r"rows-([0-9]{1,18})-([0-9]{1,18})\.safetensors")


class CachedHead:
    """The whole LM head of one model, or what is there of it, as pieces of rows in a folder.

    Args:
        folder: of all heads.
        card: of the model; its `head_digest` names the head.
    """

    def __init__(self, folder: Path, card: ModelCard) -> None:
        self.folder = folder / card.head_digest
        self._card = card

    @property
    def rows(self) -> int:
        """Rows that are there, from the first one on."""
        return sum(stop - start for start, stop in self._spans())

    @property
    def complete(self) -> bool:
        """Whether all rows are there, and were checked against the digest."""
        return (self.folder / _COMPLETE).exists() and self.rows == self._card.vocab_size

    def fetch(self, ask: Callable[[int, int], HeadRows], reporter: Reporter | None = None) -> None:
        """Get the rows that are missing and check the whole; goes on where an earlier attempt was cut off.

        Args:
            ask: gives the rows of a range [start, stop) in the model's own dtype.
            reporter: told of the progress.

        Raises:
            ProtocolViolation: the rows are not those of the digest; they are thrown away.
            InvalidData: the disk is full, or a piece on it was damaged.
        """
        with self._only_writer():
            if self.complete:
                return
            card, done = self._card, self.rows
            row_bytes = card.hidden_size * DTYPES[card.head_dtype].itemsize
            step = max(1, min(card.limits.max_head_rows, _PIECE_BYTES // row_bytes))
            with (reporter or Reporter()).bar("LM head", card.vocab_size, "rows", done=done) as bar:
                for start in range(done, card.vocab_size, step):
                    stop = min(start + step, card.vocab_size)
                    write_atomically(self._path(start, stop), ask(start, stop).to_bytes())
                    bar.advance(stop - start)
            self.verify()
            write_atomically(self.folder / _COMPLETE, b"")

    def verify(self) -> None:
        """Check all rows against the digest; that of a rotated head is not made of them, so only that all are there.

        Raises:
            ProtocolViolation: they are others; they are thrown away.
            InvalidData: not all are there, or a piece is damaged.
        """
        digest, biases, head = hashlib.sha256(), list[Tensor](), None
        for piece in self._pieces():
            head = piece.head()
            digest.update(raw_bytes(head.weight_V_D))
            biases += [] if head.bias_V is None else [head.bias_V]
        for bias_N in biases:
            digest.update(raw_bytes(bias_N))
        if head is not None:
            digest.update(head.trailer())
        if not self._card.rotated and digest.hexdigest() != self._card.head_digest:
            for path in (self.folder / _COMPLETE, *self.folder.glob(_PIECES)):
                path.unlink(missing_ok=True)
            raise ProtocolViolation(
                "The rows of the LM head are not those that its digest was made of; they were thrown away.",
                hint="Run this again. If it happens again, ask the owner.",
            )

    def load(self) -> LMHead:
        """The head in the model's own dtype: V × D values in memory, and one piece.

        Raises:
            InvalidData: not all rows are there, or a piece is damaged.
        """
        card = self._card
        weight_V_D = torch.empty(card.vocab_size, card.hidden_size, dtype=DTYPES[card.head_dtype])
        biases, at = list[Tensor](), 0
        for piece in self._pieces():
            weight_V_D[at : at + len(piece.weight_N_D)] = piece.weight_N_D
            biases += [] if piece.bias_N is None else [piece.bias_N]
            at += len(piece.weight_N_D)
        if biases and sum(map(len, biases)) != at:
            raise InvalidData(f"{self.folder} holds pieces of several heads.", hint="Delete the folder.")
        return LMHead(weight_V_D, torch.cat(biases) if biases else None, piece.logit_scale, piece.softcap)

    @contextmanager
    def _only_writer(self) -> Iterator[None]:
        lock = FileLock(self.folder / ".lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise InvalidData(f"{self.folder} cannot be written to: {error.strerror}.", hint="Mend it.") from error
        try:
            yield
        finally:
            lock.release()

    def _spans(self) -> Iterator[tuple[int, int]]:
        """Ranges of the pieces that follow each other without a gap, from the first row on."""
        there: dict[int, int] = {}
        for path in self.folder.glob(_PIECES):
            if (span := _SPAN.fullmatch(path.name)) is not None and int(span[1]) < int(span[2]):
                start, stop = int(span[1]), int(span[2])
                there[start] = max(stop, there.get(start, 0))
        at = 0
        while at in there:
            yield at, there[at]
            at = there[at]

    def _pieces(self) -> Iterator[HeadRows]:
        """All pieces, from the first row to the last."""
        spans = list(self._spans())
        if not spans or spans[-1][1] != self._card.vocab_size:
            raise InvalidData(f"{self.folder} does not hold all rows.", hint="Fetch them: pema-client fetch-head.")
        for start, stop in spans:
            path = self._path(start, stop)
            try:
                piece = HeadRows.from_bytes(path.read_bytes())
                self._check(piece, stop - start)
            except (OSError, InvalidRequest, ValueError) as error:
                path.unlink(missing_ok=True)
                raise InvalidData(f"{path} was damaged, and was deleted.", hint="Run this again.") from error
            yield piece

    def _check(self, piece: HeadRows, rows: int) -> None:
        """Refuse what is no piece of so many rows of this head.

        Raises:
            ValueError: it is none.
        """
        head, dtype = piece.head(), DTYPES[self._card.head_dtype]
        if head.weight_V_D.shape != (rows, self._card.hidden_size) or any(part.dtype != dtype for part in head.parts()):
            raise ValueError("a piece of another head")
        if head.bias_V is not None and len(head.bias_V) != rows:
            raise ValueError("a bias of another length")

    def _path(self, start: int, stop: int) -> Path:
        return self.folder / f"rows-{start}-{stop}.safetensors"

"""The external memory on disk: append-only safetensors shards and a manifest with their checksums.

A shard holds a fixed range of examples and is written whole before the manifest names it. A build killed at any moment
therefore leaves a valid memory of the examples so far, and the next build continues after them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from data_owner_client.data.pair_files import read_stored_pairs, write_pairs
from data_owner_client.data.pairs import Pair
from data_owner_client.memory.manifest import Manifest, MemoryPlan, ShardRecord
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.memory.validation import is_valid
from data_owner_client.runtime.arguments import AnyPath, to_path
from data_owner_client.runtime.atomic_files import write_atomically
from protocol.codec import load_tensors
from protocol.errors import InvalidData

MANIFEST, _PAIRS, _SHOWN = "manifest.json", "pairs.jsonl", "shown.jsonl"
TRAIN, VALIDATION = "train", "validation"
"""Folder names of the two memories that training needs."""


class ExternalMemory:
    """An external memory in a folder.

    Args:
        folder: folder with the manifest and the shards.

    Attributes:
        folder: folder with the manifest and the shards.
        manifest: plan of the memory and shards written so far.

    Raises:
        InvalidData: the folder holds no memory, or its manifest is damaged.
    """

    def __init__(self, folder: AnyPath) -> None:
        self.folder = folder = to_path(folder)
        path = folder / MANIFEST
        try:
            self.manifest = Manifest.model_validate_json(path.read_bytes())
        except OSError as error:
            raise InvalidData(f"{folder} holds no memory.", hint="Build one: pema-client build-memory.") from error
        except ValidationError as error:
            raise InvalidData(
                f"{path} is damaged or of another version.", hint="Delete the folder and build the memory again."
            ) from error

    @classmethod
    def open_or_create(cls, folder: Path, plan: MemoryPlan) -> Self:
        """Open a memory for appending; create it if the folder holds none.

        Raises:
            InvalidData: the folder holds a memory with another plan or without a file of it, or the disk is full.
            IdentityMismatch: the folder holds a memory of another model.
        """
        if not (folder / MANIFEST).exists():
            write_atomically(folder / MANIFEST, Manifest(plan=plan).model_dump_json(indent=1).encode())
        memory = cls(folder)
        current = memory.manifest.plan
        current.model.require(plan.model, f"The memory in {folder}", "the server")
        different = [name for name in MemoryPlan.model_fields if getattr(current, name) != getattr(plan, name)]
        if different:
            raise InvalidData(
                f"{folder} holds a memory with another {', '.join(different)}.",
                hint="Give another --memory folder, or --overwrite to build it again.",
            )
        memory.require_shards()
        return memory

    def store_pairs(self, pairs: Sequence[Pair], shown: Sequence[Pair] | None = None) -> None:
        """Store the texts beside their rows. Some may be shown to the PLM as examples.

        Args:
            pairs: the pairs.
            shown: the pairs with surrogates, of a redacted memory; None in other memories.
        """
        for name, texts in ((_PAIRS, pairs), (_SHOWN, shown)):
            if texts is not None and not (self.folder / name).exists():
                write_pairs(self.folder / name, texts)

    def pairs(self) -> Sequence[Pair]:
        """The pairs that the memory was built from, read from disk as they are needed.

        Raises:
            InvalidData: the file with the texts is missing or holds other texts.
        """
        return self._pairs(_PAIRS, self.manifest.plan.data_digest)

    def shown_pairs(self) -> Sequence[Pair] | None:
        """The pairs with surrogates, as the owner of the PLM may see them; None unless the memory is redacted.

        Raises:
            InvalidData: the file with the texts is missing or holds other texts.
        """
        digest = self.manifest.plan.shown_digest
        return None if digest is None else self._pairs(_SHOWN, digest)

    def _pairs(self, name: str, digest: str) -> Sequence[Pair]:
        path = self.folder / name
        pairs = read_stored_pairs(path, digest)
        if pairs is None:
            raise InvalidData(
                f"{path} does not hold the texts that the memory was built from.",
                hint="Delete the file, and run the same build-memory command again.",
            )
        return pairs

    def require_shards(self) -> None:
        """Check that the files of all shards are there; their contents are checked when they are read.

        Raises:
            InvalidData: a file is missing.
        """
        for shard in self.manifest.shards:
            path = self.folder / shard.file
            if not path.is_file():
                raise InvalidData(f"{path} is missing.", hint="Build the memory again: build-memory --overwrite.")

    @property
    def complete(self) -> bool:
        """True if all examples of the plan are stored."""
        return self.manifest.examples == self.manifest.plan.examples

    @property
    def length_ratio(self) -> float:
        """Target tokens per source token, from which Gradual Unrolling predicts the length of a target."""
        return self.manifest.rows / max(1, self.manifest.source_tokens)

    @property
    def digest(self) -> str:
        """SHA-256 over the checksums of all shards."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.manifest.shards).encode()).hexdigest()

    def append(self, rows: MemoryRows) -> None:
        """Write the next shard, then the manifest that names it.

        Raises:
            InvalidData: the disk is full.
        """
        data = rows.to_bytes()
        record = ShardRecord(
            file=f"shard-{len(self.manifest.shards):05d}.safetensors",
            examples=len(rows.rows_E),
            rows=len(rows.target_N),
            sha256=hashlib.sha256(data).hexdigest(),
        )
        write_atomically(self.folder / record.file, data)
        self.manifest = self.manifest.model_copy(
            update={
                "shards": (*self.manifest.shards, record),
                "source_tokens": self.manifest.source_tokens + int(rows.source_tokens_E.sum()),
            }
        )
        write_atomically(self.folder / MANIFEST, self.manifest.model_dump_json(indent=1).encode())

    def load(self) -> MemoryRows:
        """All rows of all shards.

        Raises:
            InvalidData: the memory is not complete, or a shard is missing or damaged.
        """
        return MemoryRows.concatenate(list(self.shards()))

    def shards(self) -> Iterator[MemoryRows]:
        """Iterate over all shards.

        Raises:
            InvalidData: the memory is not complete, or a shard is missing or damaged.
        """
        self.require_complete()
        yield from map(self.shard, range(len(self.manifest.shards)))

    def require_complete(self) -> None:
        """Refuse a memory that is still being built.

        Raises:
            InvalidData: the memory is not complete.
        """
        if not self.complete:
            raise InvalidData(
                f"{self.folder} holds {self.manifest.examples} of {self.manifest.plan.examples} examples.",
                hint="Run the same build-memory command again: it goes on where it stopped.",
            )

    @property
    def shard_rows(self) -> list[int]:
        """Number of rows of each shard."""
        return [shard.rows for shard in self.manifest.shards]

    @property
    def shard_examples(self) -> list[int]:
        """Number of examples of each shard."""
        return [shard.examples for shard in self.manifest.shards]

    def shard(self, number: int) -> MemoryRows:
        """Read one shard, by its index from 0.

        Raises:
            InvalidData: the shard is missing or damaged.
        """
        record = self.manifest.shards[number]
        path = self.folder / record.file
        damaged = InvalidData(f"{path} is damaged.", hint="Delete the folder and build the memory again.")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise damaged from error
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise damaged
        try:
            rows = MemoryRows.from_columns(load_tensors(data))
        except ValueError as error:
            raise damaged from error
        plan = self.manifest.plan
        if (len(rows.rows_E), len(rows.target_N)) != (record.examples, record.rows) or not is_valid(rows, plan.model):
            raise damaged
        return rows

"""The external memory on disk: append-only safetensors shards and a manifest with their checksums.

A shard holds a fixed run of examples, and is written whole before the manifest names it. A build killed at any moment
therefore leaves a valid memory of the examples so far, and the next run goes on behind them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from data_owner_client.data import Pair, digest_pairs, read_written_pairs, write_pairs
from data_owner_client.files import write_atomically
from data_owner_client.memory.whole import is_whole
from data_owner_client.tasks import Task
from protocol.codec import unpacked
from protocol.errors import IdentityMismatch, InvalidData
from protocol.messages import CrKind, ModelCard, WireDtype
from protocol.rows import expand

ContextMode = Literal["private", "teacher-forced"]
MANIFEST, _PAIRS = "manifest.json", "pairs.jsonl"
# Columns that belong to the contexts, not to the targets.
_OF_CONTEXTS = ("cr_N_D", "cr_scale_N", "logsumexp_N", "last_hidden_N_D", "last_hidden_scale_N")
TRAIN, VALIDATION = "train", "validation"
"""Folders of the two memories that a training takes."""


class ModelIdentity(BaseModel):
    """The model that a memory or an adapter belongs to."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: str
    digest: str
    cr_kind: CrKind
    hidden_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)

    @classmethod
    def of(cls, card: ModelCard) -> Self:
        """The identity in a model card."""
        return cls(**{name: getattr(card, name) for name in cls.model_fields})

    def require(self, other: ModelIdentity, what: str, other_what: str) -> None:
        """Refuse to use two things of different models together.

        Raises:
            IdentityMismatch: they differ; the message names both.
        """
        if self.digest != other.digest:
            raise IdentityMismatch(
                f"{what} belongs to {self.name} ({self.digest[:12]}, {self.cr_kind}), but {other_what} to {other.name} "
                f"({other.digest[:12]}, {other.cr_kind}).",
                hint="Use the server that it was made with, or build and train again for this one.",
            )


@dataclass(frozen=True)
class MemoryRows:
    """Rows of a memory: N rows of E examples, one row for each target token.

    Attributes:
        cr_N_D: context representations f(c_i), in the memory's number format.
        target_N: int32 token ids y_i.
        rows_E: int32, rows of each example; the last of them is the stop.
        source_tokens_E: int32, length of each source text in tokens.
        logsumexp_N: float32, the PLM's log Σ_v exp(logit_v), where the memory has it.
        last_hidden_N_D: the LM head's input, where `cr_N_D` is something else.
        cr_scale_N: float32, what each row of `cr_N_D` is to be multiplied by, where that is int8.
        last_hidden_scale_N: the same of `last_hidden_N_D`.
        context_N: int32, in private memories the row of the same example, counted from 0, whose context comes nearest
            to the true one of this row's target (`memory.alignment`).
        agrees_N: uint8, whether that context ends as the true one does.
        sure_N: uint8, whether that is no coincidence; always so in the first row of an example.
    """

    cr_N_D: Tensor
    target_N: Tensor
    rows_E: Tensor
    source_tokens_E: Tensor
    logsumexp_N: Tensor | None = None
    last_hidden_N_D: Tensor | None = None
    cr_scale_N: Tensor | None = None
    last_hidden_scale_N: Tensor | None = None
    context_N: Tensor | None = None
    agrees_N: Tensor | None = None
    sure_N: Tensor | None = None

    def position_N(self) -> Tensor:
        """int64 position t of each row in its target, from 0."""
        return torch.arange(len(self.target_N)) - self._start_N()

    def aligned(self) -> MemoryRows:
        """The same targets, each with the context that comes nearest to its true one; as it is if all are true."""
        if self.context_N is None:
            return self
        index_N = self._start_N() + self.context_N.long()
        moved = {name: getattr(self, name) for name in _OF_CONTEXTS if getattr(self, name) is not None}
        return replace(self, context_N=None, **{name: column[index_N] for name, column in moved.items()})

    def by_position(self) -> MemoryRows:
        """The same without what is known of other pairings: the k-th context stands for that of the k-th token."""
        return replace(self, context_N=None, agrees_N=None, sure_N=None)

    def strict(self) -> MemoryRows:
        """The same, said to agree only where the contexts are sure to; as it is if all are true."""
        return self if self.sure_N is None else replace(self, agrees_N=self.sure_N)

    def agreeing(self) -> MemoryRows:
        """The rows whose contexts agree without the others, so that positions are no longer those in the targets."""
        if self.agrees_N is None:
            return self
        kept_N = self.agrees_N.bool()
        rows_E = [int(kept_T.sum()) for kept_T in kept_N.split(self.rows_E.tolist())]
        return self._of_rows(kept_N, rows_E=torch.tensor(rows_E, dtype=torch.int32))

    def first(self, examples: int) -> MemoryRows:
        """The rows of the first so many examples."""
        rows_E = self.rows_E[:examples]
        rows = slice(int(rows_E.sum()))
        return self._of_rows(rows, rows_E=rows_E, source_tokens_E=self.source_tokens_E[:examples])

    def _of_rows(self, index: Tensor | slice, **of_examples: Tensor) -> MemoryRows:
        columns = {field.name: getattr(self, field.name) for field in fields(self) if not field.name.endswith("_E")}
        kept = {name: column[index] for name, column in columns.items() if column is not None}
        return replace(self, **kept, **of_examples)

    def _start_N(self) -> Tensor:
        starts_E = self.rows_E.long().cumsum(0) - self.rows_E.long()
        return starts_E.repeat_interleave(self.rows_E.long())

    def representations_N_D(self) -> Tensor:
        """f(c_i) as floats."""
        return expand(self.cr_N_D, self.cr_scale_N)

    def head_input_N_D(self) -> Tensor:
        """What the LM head is applied to for P_PLM, as floats."""
        if self.last_hidden_N_D is None:
            return self.representations_N_D()
        return expand(self.last_hidden_N_D, self.last_hidden_scale_N)

    @classmethod
    def concatenate(cls, parts: list[MemoryRows]) -> Self:
        """Rows of several parts, in their order."""
        columns: dict[str, Any] = {}
        for field in fields(cls):
            values = [getattr(part, field.name) for part in parts]
            columns[field.name] = None if any(value is None for value in values) else torch.cat(values)
        return cls(**columns)

    def to_bytes(self) -> bytes:
        """As a safetensors container."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        packed: bytes = safetensors.torch.save({k: v.contiguous() for k, v in columns.items() if v is not None})
        return packed


class ShardRecord(BaseModel):
    """One shard as the manifest knows it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str = Field(pattern=r"^shard-[0-9]{5,}\.safetensors$")
    examples: int = Field(ge=0)
    rows: int = Field(ge=0)
    sha256: str


class MemoryPlan(BaseModel):
    """What decides the content of a memory. Two builds with the same plan give the same memory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelIdentity
    task: Task
    context_mode: ContextMode
    dtype: WireDtype
    with_logsumexp: bool
    data_digest: str
    examples: int = Field(ge=0)
    examples_per_shard: int = Field(ge=1)


class Manifest(BaseModel):
    """Plan, shards so far, and the token counts that the length ratio is made of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["pema-memory-2"] = "pema-memory-2"
    plan: MemoryPlan
    shards: tuple[ShardRecord, ...] = ()
    source_tokens: int = Field(default=0, ge=0)

    @property
    def examples(self) -> int:
        """Examples stored so far."""
        return sum(shard.examples for shard in self.shards)

    @property
    def rows(self) -> int:
        """Rows stored so far."""
        return sum(shard.rows for shard in self.shards)


class ExternalMemory:
    """A memory folder.

    Args:
        folder: where the manifest and the shards lie.

    Raises:
        InvalidData: there is no memory, or its manifest is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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
    def create(cls, folder: Path, plan: MemoryPlan) -> Self:
        """Open the memory for appending, new or where an earlier build stopped.

        Raises:
            InvalidData, IdentityMismatch: the folder holds another memory.
        """
        if not (folder / MANIFEST).exists():
            write_atomically(folder / MANIFEST, Manifest(plan=plan).model_dump_json(indent=1).encode())
        memory = cls(folder)
        found = memory.manifest.plan
        found.model.require(plan.model, f"The memory in {folder}", "the server")
        different = [name for name in MemoryPlan.model_fields if getattr(found, name) != getattr(plan, name)]
        if different:
            raise InvalidData(
                f"{folder} holds a memory with another {', '.join(different)}.",
                hint="Give another --memory folder, or --overwrite to build it anew.",
            )
        return memory

    def keep_pairs(self, pairs: Sequence[Pair]) -> None:
        """Keep the texts beside their rows: some are shown to the PLM as examples."""
        if not (self.folder / _PAIRS).exists():
            write_pairs(self.folder / _PAIRS, pairs)

    def pairs(self) -> list[Pair]:
        """The texts that the memory was built from.

        Raises:
            InvalidData: they are missing, or not those that it was built from.
        """
        path = self.folder / _PAIRS
        pairs = read_written_pairs(path)
        if digest_pairs(pairs) != self.manifest.plan.data_digest:
            raise InvalidData(
                f"{path} does not hold the texts that the memory was built from.",
                hint="Delete the file, and run the same build-memory command again.",
            )
        return pairs

    @property
    def complete(self) -> bool:
        """Whether all examples of the plan are stored."""
        return self.manifest.examples == self.manifest.plan.examples

    @property
    def length_ratio(self) -> float:
        """Target tokens for each source token: what Gradual Unrolling predicts a sentence's length with."""
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
        """All rows. What is raised: see `shards`."""
        return MemoryRows.concatenate(list(self.shards()))

    def shards(self) -> Iterator[MemoryRows]:
        """All rows, shard by shard.

        Raises:
            InvalidData: the memory is not complete, or a shard is missing or damaged.
        """
        self.require_complete()
        yield from map(self.shard, range(len(self.manifest.shards)))

    def require_complete(self) -> None:
        """Refuse a memory that is still being built.

        Raises:
            InvalidData: it is.
        """
        if not self.complete:
            raise InvalidData(
                f"{self.folder} holds {self.manifest.examples} of {self.manifest.plan.examples} examples.",
                hint="Run the same build-memory command again: it goes on where it stopped.",
            )

    @property
    def shard_rows(self) -> list[int]:
        """Rows of each shard."""
        return [shard.rows for shard in self.manifest.shards]

    @property
    def shard_examples(self) -> list[int]:
        """Examples of each shard."""
        return [shard.examples for shard in self.manifest.shards]

    def shard(self, number: int) -> MemoryRows:
        """One shard.

        Raises:
            InvalidData: it is missing or damaged.
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
            rows = MemoryRows(**unpacked(data))
        except (ValueError, TypeError) as error:
            raise damaged from error
        plan = self.manifest.plan
        if (len(rows.rows_E), len(rows.target_N)) != (record.examples, record.rows) or not is_whole(rows, plan.model):
            raise damaged
        return rows

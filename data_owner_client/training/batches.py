"""Shuffled batches of a memory's rows, read from disk with a few shards in RAM at a time.

Every epoch takes the shards in another order, a few at a time, and shuffles the rows of these. Each batch mixes rows of
many examples, so this is as good as shuffling all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor

from data_owner_client.adapter.bounds import TextBounds
from data_owner_client.adapter.candidates import index_of, token_set
from data_owner_client.adapter.network import RECENT_TOKENS
from data_owner_client.data.repetition import longest_repetition
from data_owner_client.memory.rows import MemoryRows
from protocol.errors import InvalidData
from protocol.integrity import require_finite

# Size of the representations that are shuffled together; a single larger shard may exceed it.
_POOL_BYTES = 2**26
_ROWS_AT_ONCE = 4096
# Rows that the principal axes are computed from, for each axis.
_ROWS_PER_AXIS = 16


@dataclass(frozen=True)
class Batch:
    """Rows with their labels among the candidates.

    Attributes:
        cr_N_D: float16 or float32 representations.
        label_N: int64 index of the target among the candidates; −1 if it is no candidate.
        previous_N_P: int64 index of each of the P preceding target tokens among the candidates, the newest first; −1 if
            there is none.
        matches_N: bool, whether the representation is that of a context that ends as the target so far.
    """

    cr_N_D: Tensor
    label_N: Tensor
    previous_N_P: Tensor
    matches_N: Tensor

    @classmethod
    def from_rows(cls, rows: MemoryRows, candidate_ids_C: Tensor) -> Batch:
        """All rows of a shard as one batch. The candidate ids are sorted."""
        label_N, position_N = index_of(rows.target_N.long(), candidate_ids_C), rows.position_N()
        previous = [label_N.roll(k).masked_fill(position_N < k, -1) for k in range(1, RECENT_TOKENS + 1)]
        matches_N = torch.ones_like(label_N) if rows.matches_N is None else rows.matches_N
        return cls(rows.representations_N_D(), label_N, torch.stack(previous, dim=1), matches_N.bool())

    def __len__(self) -> int:
        return len(self.label_N)

    def __getitem__(self, index: Tensor | slice) -> Batch:
        return self._map(lambda column: column[index])

    def to_device(self, device: torch.device) -> Batch:
        """The rows on a GPU, copied without waiting for the work that runs there."""
        return self._map(lambda column: column.pin_memory().to(device, non_blocking=True))

    def rotated(self, axes_D_D: Tensor) -> Batch:
        """The rows with representations in other axes, float32."""
        return replace(self, cr_N_D=self.cr_N_D.float() @ axes_D_D.T)

    @classmethod
    def concatenate(cls, parts: Sequence[Batch]) -> Batch:
        """The rows of several batches, in their order."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(**{field.name: change(getattr(self, field.name)) for field in fields(self)})


class ShardSource(Protocol):
    """Source of rows in shards: a memory on disk, or rows in RAM."""

    @property
    def shard_rows(self) -> Sequence[int]:
        """Rows of each shard."""

    def shard(self, number: int) -> MemoryRows:
        """One shard."""


@dataclass(frozen=True)
class ShardView:
    """A memory with a function applied to each shard.

    Attributes:
        memory: source of the shards.
        view: function of a shard; it keeps the number of rows.
    """

    memory: ShardSource
    view: Callable[[MemoryRows], MemoryRows]

    @property
    def shard_rows(self) -> Sequence[int]:
        """Rows of each shard."""
        return self.memory.shard_rows

    def shard(self, number: int) -> MemoryRows:
        """One shard."""
        return self.view(self.memory.shard(number))


class ReliableRows:
    """The rows of a memory whose contexts match the true ones reliably.

    Args:
        memory: source of aligned rows. All its shards are read once, to count rows.
    """

    def __init__(self, memory: ShardSource) -> None:
        self._memory = memory
        counts = []
        for number, rows in enumerate(memory.shard_rows):
            reliable_N = memory.shard(number).reliable_N
            counts.append(rows if reliable_N is None else int(reliable_N.sum()))
        self.shard_rows: Sequence[int] = counts

    def shard(self, number: int) -> MemoryRows:
        """One shard."""
        return self._memory.shard(number).only_reliable_match().matching_rows()


class FirstExamples:
    """The first examples of a memory.

    Args:
        memory: source of the shards.
        shard_examples: number of examples in each shard.
        examples: number of examples to take.
    """

    def __init__(self, memory: ShardSource, shard_examples: Sequence[int], examples: int) -> None:
        self._memory = memory
        self._examples: list[int] = []  # number taken from each shard
        for count in shard_examples:
            if sum(self._examples) < examples:
                self._examples.append(min(count, examples - sum(self._examples)))
        self.shard_rows: Sequence[int] = memory.shard_rows[: len(self._examples)]
        if self._examples and self._examples[-1] < shard_examples[len(self._examples) - 1]:
            last = len(self._examples) - 1
            self.shard_rows = [*self.shard_rows[:-1], len(self.shard(last).target_N)]

    def shard(self, number: int) -> MemoryRows:
        """One shard."""
        return self._memory.shard(number).head(self._examples[number])


@dataclass(frozen=True)
class MemoryStats:
    """Statistics of a memory that training needs before its first step.

    Attributes:
        candidate_ids_C: int64, sorted: all token ids that occur as targets.
        rms: root mean square of the representations.
        axes_D_D: float32, orthogonal: the principal axes of the first representations, a row each. Adam scales each
            coordinate separately, so it learns less when the main directions are spread over all coordinates, as in a
            secret basis. Along its principal axes a memory looks the same in every basis.
        bounds: bounds of generated texts, from the targets.
    """

    candidate_ids_C: Tensor
    rms: float
    axes_D_D: Tensor
    bounds: TextBounds

    @classmethod
    def from_memory(cls, memory: ShardSource) -> MemoryStats:
        """Read all shards once and return their statistics.

        Args:
            memory: source of the shards.

        Raises:
            InvalidData: a shard is missing or damaged, or the memory has no rows.
            NumericalFault: a representation is not finite.
        """
        ids_C, squares, count = torch.empty(0, dtype=torch.int64), 0.0, 0
        shards, axes, targets = len(memory.shard_rows), _PrincipalAxes(), _TargetLengths()
        for number in range(shards):
            rows = memory.shard(number)
            ids_C = token_set([ids_C, rows.target_N])
            targets.add(rows)
            cr_N_D = rows.representations_N_D()
            for cr_B_D in cr_N_D.split(_ROWS_AT_ONCE):
                require_finite(cr_B_D, "the memory's representations")
                squares += cr_B_D.float().square().sum(dtype=torch.float64).item()
                count += cr_B_D.numel()
            axes.add(cr_N_D[: -(-_ROWS_PER_AXIS * cr_N_D.shape[1] // shards)])
        if not count:
            raise InvalidData("The memory has no rows.", hint="Build it from at least one pair.")
        return cls(ids_C, math.sqrt(squares / count), axes.result(), targets.bounds())


class _TargetLengths:
    """Lengths and repetitions of targets that arrive a shard at a time."""

    def __init__(self) -> None:
        self._rows, self._source_tokens = list[Tensor](), list[Tensor]()
        self._longest_repetition = 0

    def add(self, rows: MemoryRows) -> None:
        self._rows.append(rows.rows_E)
        self._source_tokens.append(rows.source_tokens_E)
        targets = (ids_T.tolist() for ids_T in rows.target_N.split(rows.rows_E.tolist()))
        self._longest_repetition = max(self._longest_repetition, longest_repetition(targets))

    def bounds(self) -> TextBounds:
        """Bounds of texts that are generated in the manner of these targets."""
        return TextBounds.from_lengths(torch.cat(self._rows), torch.cat(self._source_tokens), self._longest_repetition)


class _PrincipalAxes:
    """Principal axes of rows that arrive a few at a time.

    All of it is float64. The largest eigenvalue may be 10⁵ times the smallest, and neighbours differ by a hundredth. In
    float32 a third of the axes were others in each secret basis, and so were the adapters.
    """

    def __init__(self) -> None:
        self._moment_D_D = self._sum_D = torch.zeros((), dtype=torch.float64)

    def add(self, rows_N_D: Tensor) -> None:
        for rows_B_D in rows_N_D.split(_ROWS_AT_ONCE):
            exact_B_D = rows_B_D.double()
            self._moment_D_D = self._moment_D_D + exact_B_D.T @ exact_B_D
            self._sum_D = self._sum_D + exact_B_D.sum(dim=0)

    def result(self) -> Tensor:
        """The axes, float32, a row each."""
        axes_D_D: Tensor = torch.linalg.eigh(self._moment_D_D).eigenvectors.T
        # Eigenvectors have no sign: point each to the side on which the rows lie.
        signs_D_1 = torch.where(axes_D_D @ self._sum_D < 0, -1.0, 1.0)[:, None]
        return (signs_D_1 * axes_D_D).float().contiguous()


class RowStream:
    """Batches of all rows of a memory, in an order that depends on the seed and the epoch.

    Args:
        memory: source of the shards.
        candidate_ids_C: int64, sorted.
        batch_rows: number of rows in a batch; the last batch of an epoch may have fewer.
        seed: seed of the orders.
        pool_bytes: approximate size of the rows that are in RAM and shuffled together.
    """

    def __init__(
        self, memory: ShardSource, candidate_ids_C: Tensor, *, batch_rows: int, seed: int, pool_bytes: int = _POOL_BYTES
    ) -> None:
        self._memory = memory
        self._candidate_ids_C = candidate_ids_C
        self._batch_rows = batch_rows
        self._seed = seed
        self._pool_bytes = pool_bytes
        self.rows = sum(memory.shard_rows)

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return -(-self.rows // self._batch_rows)

    def epoch(self, number: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, beginning with batch `start`.

        Raises:
            InvalidData: a shard is missing or damaged.
        """
        rng = torch.Generator().manual_seed(self._seed)
        # An epoch's order must not depend on whether the epochs before it were run.
        seeds = torch.randint(2**62, (number + 1,), generator=rng)
        rng.manual_seed(int(seeds[number]))
        step, partial = 0, None
        for rows, order_N in self._pools(rng):
            missing = self._batch_rows - (len(partial) if partial else 0)
            for index_B in (order_N[:missing], *order_N[missing:].split(self._batch_rows)):
                batch = rows[index_B] if partial is None else Batch.concatenate([partial, rows[index_B]])
                partial = batch if len(batch) < self._batch_rows else None
                if partial is None:
                    if step >= start:
                        yield batch
                    step += 1
        if partial and step >= start:
            yield partial

    def _pools(self, rng: torch.Generator) -> Iterator[tuple[Batch, Tensor]]:
        """Yield the rows of a few shards at a time, with a random order of these rows."""
        order = torch.randperm(len(self._memory.shard_rows), generator=rng).tolist()
        pool, size = list[Batch](), 0
        for shards_read, number in enumerate(order, 1):
            pool.append(Batch.from_rows(self._memory.shard(number), self._candidate_ids_C))
            size += pool[-1].cr_N_D.nbytes
            if size >= self._pool_bytes or shards_read == len(order):
                rows = Batch.concatenate(pool)
                pool, size = [], 0
                yield rows, torch.randperm(len(rows), generator=rng)

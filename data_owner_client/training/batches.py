"""The rows of a memory in shuffled batches, from disk: however many there are, a few shards are in memory.

Every epoch takes the shards in another order, a few at a time, and shuffles the rows of those. With rows of so many
examples in a batch, that is as good as an order of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor

from data_owner_client.adapter.candidates import index_of, token_set
from data_owner_client.adapter.network import RECENT_TOKENS
from data_owner_client.memory.rows import MemoryRows
from protocol.errors import InvalidData
from protocol.integrity import require_finite

# Of the representations that are shuffled together; more, where one shard has more.
_POOL_BYTES = 2**26
_ROWS_AT_ONCE = 4096
# Of a memory, to find its principal axes.
_ROWS_PER_AXIS = 16


@dataclass(frozen=True)
class Batch:
    """Rows with their labels among the candidates.

    Attributes:
        cr_N_D: float16 or float32 representations.
        label_N: int64 index into the candidates; −1 where the target is none of them.
        previous_N_K: the same of the target tokens before, the newest first; −1 where there is none.
        matches_N: bool, whether the representation is that of a context that ends as the target so far.
    """

    cr_N_D: Tensor
    label_N: Tensor
    previous_N_K: Tensor
    matches_N: Tensor

    @classmethod
    def of(cls, rows: MemoryRows, candidate_ids_C: Tensor) -> Batch:
        """Rows of a memory; candidate ids are sorted."""
        label_N, position_N = index_of(rows.target_N.long(), candidate_ids_C), rows.position_N()
        before = [label_N.roll(k).masked_fill(position_N < k, -1) for k in range(1, RECENT_TOKENS + 1)]
        matches_N = torch.ones_like(label_N) if rows.matches_N is None else rows.matches_N
        return cls(rows.representations_N_D(), label_N, torch.stack(before, dim=1), matches_N.bool())

    def __len__(self) -> int:
        return len(self.label_N)

    def __getitem__(self, index: Tensor | slice) -> Batch:
        return self._map(lambda column: column[index])

    def sent_to(self, device: torch.device) -> Batch:
        """The rows on a GPU, without waiting for what runs there."""
        return self._map(lambda column: column.pin_memory().to(device, non_blocking=True))

    def turned(self, axes_D_D: Tensor) -> Batch:
        """The same with representations along other axes, float32."""
        return replace(self, cr_N_D=self.cr_N_D.float() @ axes_D_D.T)

    @classmethod
    def concatenate(cls, parts: Sequence[Batch]) -> Batch:
        """Rows of several parts, in their order."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(**{field.name: change(getattr(self, field.name)) for field in fields(self)})


class ShardSource(Protocol):
    """What can be streamed: a memory on disk, or rows that are there already."""

    @property
    def shard_rows(self) -> Sequence[int]:
        """Rows of each shard."""

    def shard(self, number: int) -> MemoryRows:
        """One shard."""


@dataclass(frozen=True)
class ShardView:
    """A memory whose shards are seen in another way.

    Attributes:
        memory: as it lies on disk.
        view: of each shard; as many rows as there are.
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
    """The rows of a memory whose contexts are sure to agree with the true ones, without the others.

    Args:
        memory: with the contexts that are nearest to the true ones; all its shards are read once.
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
        memory: all of them.
        shard_examples: examples of each of its shards.
        examples: how many.
    """

    def __init__(self, memory: ShardSource, shard_examples: Sequence[int], examples: int) -> None:
        self._memory = memory
        self._examples: list[int] = []  # of each shard
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
    """What must be known of a memory before training.

    Attributes:
        candidate_ids_C: int64, sorted: all its targets.
        rms: root mean square of its representations.
        axes_D_D: float32, orthogonal: the principal axes of some of them, a row each. Adam gives each coordinate a step
            of its own, so it learns less where what varies most is spread over all of them, as in a secret basis.
            Along its principal axes a memory looks the same in every basis.
    """

    candidate_ids_C: Tensor
    rms: float
    axes_D_D: Tensor

    @classmethod
    def of(cls, memory: ShardSource) -> MemoryStats:
        """Read all shards once.

        Args:
            memory: with the shards.

        Raises:
            InvalidData: one is missing or damaged, or there are no rows.
            NumericalFault: representations are not finite.
        """
        ids_C, square, numbers = torch.empty(0, dtype=torch.int64), 0.0, 0
        shards, principal = len(memory.shard_rows), _PrincipalAxes()
        for number in range(shards):
            rows = memory.shard(number)
            ids_C = token_set([ids_C, rows.target_N])
            cr_N_D = rows.representations_N_D()
            for cr_B_D in cr_N_D.split(_ROWS_AT_ONCE):
                require_finite(cr_B_D, "the memory's representations")
                square += cr_B_D.float().square().sum(dtype=torch.float64).item()
                numbers += cr_B_D.numel()
            principal.add(cr_N_D[: -(-_ROWS_PER_AXIS * cr_N_D.shape[1] // shards)].float())
        if not numbers:
            raise InvalidData("The memory has no rows.", hint="Build it from at least one pair.")
        return cls(ids_C, math.sqrt(square / numbers), principal.found())


class _PrincipalAxes:
    """Of rows that come a few at a time."""

    def __init__(self) -> None:
        self._moment_D_D = self._sum_D = torch.zeros(())

    def add(self, rows_B_D: Tensor) -> None:
        self._moment_D_D = self._moment_D_D + rows_B_D.T @ rows_B_D
        self._sum_D = self._sum_D + rows_B_D.sum(dim=0)

    def found(self) -> Tensor:
        """float32, a row each."""
        require_finite(self._moment_D_D, "the products of the memory's representations")
        axes_D_D: Tensor = torch.linalg.eigh(self._moment_D_D).eigenvectors.T
        # An axis has no direction of its own: the one in which the rows lie.
        signs_D_1 = torch.where(axes_D_D @ self._sum_D < 0, -1.0, 1.0)[:, None]
        return (signs_D_1 * axes_D_D).contiguous()


class RowStream:
    """All rows of a memory, in another order each time; the same epoch always in the same one.

    Args:
        memory: of N rows.
        candidate_ids_C: int64, sorted.
        batch_rows: rows of a batch; the last one of an epoch may have fewer.
        seed: of the orders.
        pool_bytes: about as much of the memory is shuffled, and held, together.
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
        """The batches of an epoch from the one with number `start` on.

        Raises:
            InvalidData: a shard is missing or damaged.
        """
        rng = torch.Generator().manual_seed(self._seed)
        # An epoch's order must not depend on whether the ones before it were run.
        seeds_E = torch.randint(2**62, (number + 1,), generator=rng)
        rng.manual_seed(int(seeds_E[number]))
        step, begun = 0, None
        for rows, order_N in self._pools(rng):
            missing = self._batch_rows - (len(begun) if begun else 0)
            for index_B in (order_N[:missing], *order_N[missing:].split(self._batch_rows)):
                batch = rows[index_B] if begun is None else Batch.concatenate([begun, rows[index_B]])
                begun = batch if len(batch) < self._batch_rows else None
                if begun is None:
                    if step >= start:
                        yield batch
                    step += 1
        if begun and step >= start:
            yield begun

    def _pools(self, rng: torch.Generator) -> Iterator[tuple[Batch, Tensor]]:
        """The rows of some shards at a time, and an order for them."""
        order = torch.randperm(len(self._memory.shard_rows), generator=rng).tolist()
        pool, size = list[Batch](), 0
        for place, number in enumerate(order, 1):
            pool.append(Batch.of(self._memory.shard(number), self._candidate_ids_C))
            size += pool[-1].cr_N_D.nbytes
            if size >= self._pool_bytes or place == len(order):
                rows = Batch.concatenate(pool)
                pool, size = [], 0
                yield rows, torch.randperm(len(rows), generator=rng)

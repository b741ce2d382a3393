"""Random rows of a memory, for trainings whose texts do not matter."""

from __future__ import annotations

import torch

from data_owner_client.memory.rows import MemoryRows

ROWS_PER_EXAMPLE = 16


def random_rows(examples: int, width: int, candidates: int, rng: torch.Generator) -> MemoryRows:
    """Rows with normally distributed representations and equally probable targets.

    Args:
        examples: number of examples, of `ROWS_PER_EXAMPLE` rows each.
        width: size D of a representation.
        candidates: number of different targets.
        rng: source of the numbers.
    """
    rows = examples * ROWS_PER_EXAMPLE
    return MemoryRows(
        cr_N_D=torch.randn(rows, width, generator=rng).half(),
        target_N=torch.randint(candidates, (rows,), generator=rng, dtype=torch.int32),
        rows_E=torch.full((examples,), ROWS_PER_EXAMPLE, dtype=torch.int32),
        source_tokens_E=torch.full((examples,), 12, dtype=torch.int32),
        logsumexp_N=torch.full((rows,), 12.0),
    )

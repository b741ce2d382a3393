"""Batches that are drafted to their ends."""

from __future__ import annotations

from collections.abc import Sequence

from plm_owner_server.engines.interface import Decoded, DraftBatch, Drafting, Engine


def run_to_end(drafting: Drafting, batches: Sequence[DraftBatch]) -> list[Decoded]:
    """The results of batches that have joined, in their order."""
    done: dict[DraftBatch, Decoded] = {}
    while len(done) < len(batches):
        done |= dict(drafting.step())
    return [done[batch] for batch in batches]


def drafted(engine: Engine, batches: Sequence[DraftBatch]) -> list[Decoded]:
    """The results of batches that an engine drafts at the same time."""
    drafting = engine.drafting(4096)
    drafting.join(batches)
    return run_to_end(drafting, batches)

"""Build the memories of the training pairs and the held-out pairs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from data_owner_client.data.pairs import Pair, split_validation
from data_owner_client.data.tasks import Task
from data_owner_client.memory.build import build_memory
from data_owner_client.memory.manifest import ContextMode
from data_owner_client.memory.store import TRAIN, VALIDATION
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter


class MemoryReport(BaseModel):
    """What `build_memories` made."""

    folder: str
    examples: int
    rows: int
    validation_examples: int
    validation_rows: int
    context_mode: ContextMode
    length_ratio: float
    seconds: float


def build_memories(
    plm: RemotePlm,
    task: Task,
    pairs: Sequence[Pair],
    folder: Path,
    *,
    validation: Sequence[Pair] | None = None,
    validation_fraction: float = 0.05,
    context_mode: ContextMode = "private",
    share_targets: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> MemoryReport:
    """Build `folder/train` and `folder/validation`, or finish what an interrupted run began.

    Without `validation` pairs, a share of `pairs` is set aside. What the other arguments mean, and what is raised: see
    `memory.build_memory`.
    """
    started = time.perf_counter()
    if validation is None:
        train_pairs, held_out = split_validation(pairs, validation_fraction)
    else:
        train_pairs, held_out = list(pairs), list(validation)
    reporter = reporter or Reporter()
    if share_targets or context_mode == "private":
        reporter.say(disclosure(context_mode))
    memories = [
        build_memory(
            plm,
            task,
            part,
            folder / name,
            context_mode=context_mode,
            share_targets=share_targets,
            with_logsumexp=name == VALIDATION,
            overwrite=overwrite,
            reporter=reporter,
        )
        for name, part in ((TRAIN, train_pairs), (VALIDATION, held_out))
    ]
    return MemoryReport(
        folder=str(folder),
        examples=memories[0].manifest.examples,
        rows=memories[0].manifest.rows,
        validation_examples=memories[1].manifest.examples,
        validation_rows=memories[1].manifest.rows,
        context_mode=context_mode,
        length_ratio=memories[0].length_ratio,
        seconds=time.perf_counter() - started,
    )


def disclosure(context_mode: ContextMode) -> str:
    """What leaves this machine while a memory is built, in one line."""
    if context_mode == "private":
        return "Leaves this machine: the prompts with their source texts, and the targets' lengths. No target text."
    return "Leaves this machine: the prompts with their source texts, and every target text (--share-targets)."

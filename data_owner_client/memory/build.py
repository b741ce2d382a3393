"""Build an external memory from pairs of texts, over any connection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from data_owner_client.data.pairs import Pair, digest_pairs
from data_owner_client.data.tasks import Task
from data_owner_client.memory.encode import encode_private, encode_teacher_forced, require_fits, tokenize_pair
from data_owner_client.memory.manifest import MemoryPlan
from data_owner_client.memory.request_batches import ExampleSizes, split_into_requests
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.memory.store import MANIFEST, ExternalMemory
from data_owner_client.memory.types import ContextMode
from data_owner_client.plm.connection.in_flight import InFlightWindow, ordered_map
from data_owner_client.plm.identity import ModelIdentity
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter
from protocol.errors import InvalidData

_EXAMPLES_PER_SHARD = 512


def build_memory(
    plm: RemotePlm,
    task: Task,
    pairs: Sequence[Pair],
    folder: Path,
    *,
    context_mode: ContextMode = "private",
    share_targets: bool = False,
    with_logsumexp: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> ExternalMemory:
    """Build a memory, or finish one whose build was interrupted.

    Args:
        plm: the remote model that computes the representations.
        task: template that turns source texts into prompts.
        pairs: texts to store; each must have a target.
        folder: the memory's folder; created if it is missing.
        context_mode: `private` sends only prompts and pairs y_i with a context of the PLM's own greedy continuation.
            `teacher-forced` also sends the targets and pairs y_i with its true context.
        share_targets: consent to show the targets to the PLM's owner; `teacher-forced` requires it.
        with_logsumexp: store the log-sum-exp of each position, too. Validation needs it; it costs the server a product
            with the full head.
        overwrite: delete the folder's current memory first.
        reporter: receives the progress; None for no reports.

    Raises:
        InvalidData: a pair cannot be used, the folder holds another memory or is in use, or the disk is full.
        PemaError: a call to the PLM failed.
    """
    if context_mode == "teacher-forced" and not share_targets:
        raise InvalidData(
            "Teacher-forced contexts show every target text to the owner of the PLM.",
            hint="Say --share-targets if that is what you want, or use --context private.",
        )
    plan = MemoryPlan(
        model=ModelIdentity.from_card(plm.card),
        task=task,
        context_mode=context_mode,
        dtype=plm.dtype,
        with_logsumexp=with_logsumexp or context_mode == "private",  # `decode` returns it anyway
        data_digest=digest_pairs(pairs),
        examples=len(pairs),
        examples_per_shard=_EXAMPLES_PER_SHARD,
    )
    # Check all pairs before anything is sent, so that an unusable one does not stop a build after an hour.
    sizes = ExampleSizes()
    reporter = reporter or Reporter()
    with reporter.bar("tokenising", len(pairs), "pairs") as bar:
        for number, pair in enumerate(pairs, 1):
            label = f"pair {number}"
            tokenized = tokenize_pair(plm, task, pair, label=label)
            require_fits(plm, tokenized, label=label, drafted=context_mode == "private")
            sizes.append(len(tokenized.prompt) + len(tokenized.target), len(tokenized.target))
            bar.advance(1)
    with _exclusive_build(folder):
        if overwrite:
            _delete_memory(folder)
        memory = ExternalMemory.open_or_create(folder, plan)
        memory.store_pairs(pairs)
        _append_missing(memory, plm, pairs, sizes, reporter)
    return memory


def _append_missing(
    memory: ExternalMemory, plm: RemotePlm, pairs: Sequence[Pair], sizes: ExampleSizes, reporter: Reporter
) -> None:
    plan, done = memory.manifest.plan, memory.manifest.examples

    def fetch(run: range) -> MemoryRows:
        chunk = [tokenize_pair(plm, plan.task, pairs[i], label=f"pair {i + 1}") for i in run]
        if plan.context_mode == "private":
            return encode_private(plm, chunk, plan.task.stop_ids(plm.tokenizer))
        return encode_teacher_forced(plm, chunk, with_logsumexp=plan.with_logsumexp)

    runs = list(split_into_requests(sizes, plm.card, plan.dtype, done=done, examples_per_shard=plan.examples_per_shard))
    window = InFlightWindow()
    parts: list[MemoryRows] = []
    # While the server computes one request, the next ones are tokenised and sent, and the last shard is stored.
    with (
        reporter.bar(f"memory {memory.folder.name}", len(pairs), "examples", done=done) as bar,
        plm.observed_by(window.observe),
    ):
        for run, rows in zip(runs, ordered_map(fetch, runs, window), strict=True):
            parts.append(rows)
            bar.advance(len(run), f"{memory.manifest.rows + sum(len(p.target_N) for p in parts):,} rows")
            if run.stop % plan.examples_per_shard == 0 or run.stop == len(pairs):
                memory.append(MemoryRows.concatenate(parts))
                parts = []


@contextmanager
def _exclusive_build(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except OSError as error:
        if not isinstance(error, Timeout):
            raise InvalidData(
                f"{folder} cannot be written to: {error.strerror}.", hint="Give another --memory folder."
            ) from error
        raise InvalidData(f"Another build-memory is writing to {folder}.", hint="Wait for it, or stop it.") from error
    try:
        yield
    finally:
        lock.release()


def _delete_memory(folder: Path) -> None:
    # The manifest first: files that no manifest names are not part of a memory.
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.jsonl"), *folder.glob(".*.partial")]:
        path.unlink()

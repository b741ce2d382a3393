"""Building an external memory from pairs of texts, over any connection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from data_owner_client.data.pairs import Pair, digest_pairs
from data_owner_client.data.tasks import Task
from data_owner_client.memory.encode import encode_private, encode_teacher_forced, require_fits, tokenize_pair
from data_owner_client.memory.manifest import ContextMode, MemoryPlan
from data_owner_client.memory.request_batches import ExampleSizes, split_into_requests
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.memory.store import MANIFEST, ExternalMemory
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
        plm: gives the representations.
        task: makes prompts of source texts.
        pairs: every pair with its target.
        folder: where the memory is or will be.
        context_mode: `private` sends prompts only and pairs y_i with the PLM's own greedy continuation;
            `teacher-forced` sends the targets, too, and pairs y_i with its true context.
        share_targets: must be true for `teacher-forced`: the targets are shown to the PLM's owner.
        with_logsumexp: also store each position's log-sum-exp (validation needs it; a full head product on the server).
        overwrite: throw away what the folder holds.
        reporter: told of the progress.

    Raises:
        InvalidData: a pair cannot be used, the folder holds another memory or is in use, the disk is full.
        PemaError: as the calls to the PLM.
    """
    if context_mode == "teacher-forced" and not share_targets:
        raise InvalidData(
            "Teacher-forced contexts show every target text to the owner of the PLM.",
            hint="Say --share-targets if that is what you want, or use --context private.",
        )
    plan = MemoryPlan(
        model=ModelIdentity.of(plm.card),
        task=task,
        context_mode=context_mode,
        dtype=plm.dtype,
        with_logsumexp=with_logsumexp or context_mode == "private",  # `decode` gives it anyway
        data_digest=digest_pairs(pairs),
        examples=len(pairs),
        examples_per_shard=_EXAMPLES_PER_SHARD,
    )
    # Before anything is sent: a pair that cannot be used should not stop a build after an hour.
    sizes = ExampleSizes()
    reporter = reporter or Reporter()
    with reporter.bar("tokenising", len(pairs), "pairs") as bar:
        for number, pair in enumerate(pairs, 1):
            place = f"pair {number}"
            tokenized = tokenize_pair(plm, task, pair, place=place)
            require_fits(plm, tokenized, place=place, drafted=context_mode == "private")
            sizes.append(len(tokenized.prompt) + len(tokenized.target), len(tokenized.target))
            bar.advance(1)
    with _only_builder(folder):
        if overwrite:
            _empty(folder)
        memory = ExternalMemory.create(folder, plan)
        memory.keep_pairs(pairs)
        _append_missing(memory, plm, pairs, sizes, reporter)
    return memory


def _append_missing(
    memory: ExternalMemory, plm: RemotePlm, pairs: Sequence[Pair], sizes: ExampleSizes, reporter: Reporter
) -> None:
    plan, done = memory.manifest.plan, memory.manifest.examples

    def fetch(run: range) -> MemoryRows:
        chunk = [tokenize_pair(plm, plan.task, pairs[i], place=f"pair {i + 1}") for i in run]
        if plan.context_mode == "private":
            return encode_private(plm, chunk, plan.task.stop_ids(plm.tokenizer))
        return encode_teacher_forced(plm, chunk, with_logsumexp=plan.with_logsumexp)

    runs = list(split_into_requests(sizes, plm.card, plan.dtype, done=done, examples_per_shard=plan.examples_per_shard))
    window = InFlightWindow()
    parts: list[MemoryRows] = []
    # While one request computes on the server, the next are tokenised and on their way, and the last shard is stored.
    with (
        reporter.bar(f"memory {memory.folder.name}", len(pairs), "examples", done=done) as bar,
        plm.observed_by(window.learn),
    ):
        for run, rows in zip(runs, ordered_map(fetch, runs, window), strict=True):
            parts.append(rows)
            bar.advance(len(run), f"{memory.manifest.rows + sum(len(p.target_N) for p in parts):,} rows")
            if run.stop % plan.examples_per_shard == 0 or run.stop == len(pairs):
                memory.append(MemoryRows.concatenate(parts))
                parts = []


@contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
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


def _empty(folder: Path) -> None:
    # The manifest first: what it does not name is not part of the memory.
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.jsonl"), *folder.glob(".*.partial")]:
        path.unlink()

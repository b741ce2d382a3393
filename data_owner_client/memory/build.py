"""Build an external memory from pairs of texts, over any connection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from data_owner_client.data.pairs import Pair, digest_pairs
from data_owner_client.data.reading.problems import Problems
from data_owner_client.data.redaction.redactor import Redactor
from data_owner_client.data.stops import StopMatcher
from data_owner_client.data.tasks import Task
from data_owner_client.memory.encode import encode_private, encode_teacher_forced, rows_that_conceal
from data_owner_client.memory.grants import Demand
from data_owner_client.memory.manifest import MemoryPlan
from data_owner_client.memory.request_batches import ExampleSizes, split_into_requests
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.memory.store import MANIFEST, ExternalMemory
from data_owner_client.memory.tokenized_pairs import tokenize_pair
from data_owner_client.memory.types import ContextMode
from data_owner_client.memory.usable_pairs import find_usable_pairs
from data_owner_client.plm.connection.in_flight import InFlightWindow, ordered_map
from data_owner_client.plm.identity import ModelIdentity
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter
from protocol.errors import InvalidData

_EXAMPLES_PER_SHARD = 512


@dataclass(frozen=True)
class MemoryBuild:
    """A memory to build, of which nothing was sent yet.

    Attributes:
        plm: the remote model that computes the representations.
        plan: plan of the memory.
        pairs: texts to store, all of them checked.
        sizes: token counts of the pairs.
        folder: the memory's folder.
        overwrite: delete the folder's current memory first.
        shown: the pairs with surrogates, of a redacted memory; None in other memories.
    """

    plm: RemotePlm
    plan: MemoryPlan
    pairs: Sequence[Pair]
    sizes: ExampleSizes
    folder: Path
    overwrite: bool
    shown: Sequence[Pair] | None = None

    @classmethod
    def prepare(
        cls,
        plm: RemotePlm,
        task: Task,
        pairs: Sequence[Pair],
        folder: Path,
        *,
        context_mode: ContextMode,
        share_targets: bool,
        held_out: bool,
        overwrite: bool,
        redactor: Redactor | None = None,
        demand: Demand,
        problems: Problems,
        reporter: Reporter,
    ) -> MemoryBuild:
        """Check all pairs, so that an unusable one does not stop a build after an hour.

        Args:
            plm: the remote model that computes the representations.
            task: template that turns source texts into prompts.
            pairs: texts to store; each must have a target.
            folder: the memory's folder; created if it is missing.
            context_mode: `private` sends only prompts and pairs y_i with a context of the PLM's own greedy
                continuation. `teacher-forced` also sends the targets and pairs y_i with its true context. `redacted`
                sends the targets with surrogates.
            share_targets: consent to show the targets to the PLM's owner; `teacher-forced` requires it.
            held_out: whether the memory is one to validate with. It stores the log-sum-exp of each position, too, which
                costs the server a product with the full head. If it is redacted, it has surrogates of its own.
            overwrite: delete the folder's current memory first.
            redactor: replaces what the owner may not see; `redacted` requires it, and the other modes have none.
            demand: what building asks of the owner is added to it.
            problems: problems of pairs are added to it; the caller settles them before `run`.
            reporter: receives the progress.

        Raises:
            InvalidData: the contexts show targets without consent, or cannot be redacted.
        """
        _require_consent(context_mode, redactor, share_targets=share_targets)
        drafted, shown = context_mode == "private", None
        if redactor is not None:
            require_redactable(task)
            task = redactor.redact_task(task)
            shown = redactor.redact_pairs(task, pairs, reporter, held_out=held_out)
        usable = find_usable_pairs(plm, task, pairs, problems, drafted=drafted, shown=shown, reporter=reporter)
        plan = MemoryPlan(
            model=ModelIdentity.from_card(plm.card),
            task=task,
            context_mode=context_mode,
            dtype=plm.dtype,
            with_logsumexp=held_out or drafted,  # `decode` returns it anyway
            data_digest=digest_pairs(usable.pairs),
            redaction_rules=redactor.redaction.digest if redactor else None,
            shown_digest=None if usable.shown is None else digest_pairs(usable.shown),
            examples=len(usable.pairs),
            examples_per_shard=_EXAMPLES_PER_SHARD,
        )
        stored = 0 if overwrite else _stored_examples(folder, plan)
        demand.add(usable.sizes, usable.target_ids, stored=stored)
        return cls(plm, plan, usable.pairs, usable.sizes, folder, overwrite, usable.shown)

    def run(self, reporter: Reporter) -> ExternalMemory:
        """Build the memory, or finish it if its build was interrupted.

        Raises:
            InvalidData: the folder holds another memory or is in use, or the disk is full.
            PemaError: a call to the PLM failed.
        """
        with _exclusive_build(self.folder):
            if self.overwrite:
                _delete_memory(self.folder)
            memory = ExternalMemory.open_or_create(self.folder, self.plan)
            memory.store_pairs(self.pairs, self.shown)
            _append_missing(memory, self, reporter)
        return memory


def build_memory(
    plm: RemotePlm,
    task: Task,
    pairs: Sequence[Pair],
    folder: Path,
    *,
    context_mode: ContextMode = "private",
    share_targets: bool = False,
    held_out: bool = False,
    overwrite: bool = False,
    redactor: Redactor | None = None,
    reporter: Reporter | None = None,
) -> ExternalMemory:
    """Build a single memory, or finish one whose build was interrupted; see `MemoryBuild.prepare` for the arguments.

    Raises:
        InvalidData: a pair cannot be used, the folder holds another memory or is in use, or the disk is full.
        PemaError: a call to the PLM failed.
    """
    problems, reporter = Problems(), reporter or Reporter()
    build = MemoryBuild.prepare(
        plm,
        task,
        pairs,
        folder,
        context_mode=context_mode,
        share_targets=share_targets,
        held_out=held_out,
        overwrite=overwrite,
        redactor=redactor,
        demand=Demand(context_mode),
        problems=problems,
        reporter=reporter,
    )
    problems.settle(len(pairs), skip=False)
    return build.run(reporter)


def _stored_examples(folder: Path, plan: MemoryPlan) -> int:
    """Examples of this very memory that an interrupted build has stored."""
    try:
        manifest = ExternalMemory(folder).manifest
    except InvalidData:
        return 0
    return manifest.examples if manifest.plan == plan else 0


def _require_consent(context_mode: ContextMode, redactor: Redactor | None, *, share_targets: bool) -> None:
    if context_mode == "teacher-forced" and not share_targets:
        raise InvalidData(
            "Teacher-forced contexts show every target text to the owner of the PLM.",
            hint="Say --share-targets if that is what you want, or use --context private.",
        )
    if (context_mode == "redacted") != (redactor is not None):
        raise InvalidData(
            "Redacted contexts need rules, and rules need redacted contexts.",
            hint="Say --share-redacted RULES without another --context.",
        )


def require_redactable(task: Task) -> None:
    """Refuse a task whose targets surrogates cannot hide.

    Raises:
        InvalidData: the targets are labels.
    """
    if task.kind == "classify":
        raise InvalidData(
            "The labels of a `classify` task are few and scored by their names, so surrogates would hide nothing.",
            hint="Build a private memory, or say --share-targets.",
        )


def _append_missing(memory: ExternalMemory, build: MemoryBuild, reporter: Reporter) -> None:
    plm, pairs, shown, sizes = build.plm, build.pairs, build.shown, build.sizes
    plan, done = memory.manifest.plan, memory.manifest.examples
    stops = StopMatcher(plm.tokenizer, plan.task.stops(plm.tokenizer, plm.card.eos_token_ids))
    least_rows = rows_that_conceal(plm, plan.task)

    def fetch(run: range) -> MemoryRows:
        chunk = [tokenize_pair(plm, plan.task, pairs[i], shown[i] if shown else None) for i in run]
        if plan.context_mode == "private":
            return encode_private(plm, chunk, stops, least_rows=least_rows)
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

"""Building an external memory from pairs of texts, over any connection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from data_owner_client.data import Pair, digest_pairs
from data_owner_client.memory.alignment import align
from data_owner_client.memory.pipeline import Window, in_order
from data_owner_client.memory.planning import Sizes, plan_requests
from data_owner_client.memory.store import MANIFEST, ContextMode, ExternalMemory, MemoryPlan, MemoryRows, ModelIdentity
from data_owner_client.plm import RemotePlm
from data_owner_client.progress import Reporter
from data_owner_client.tasks import Task
from protocol.errors import InvalidData, ProtocolViolation
from protocol.messages import DecodeResponse, EncodeResponse

_EXAMPLES_PER_SHARD = 512


@dataclass(frozen=True)
class TokenizedPair:
    """A pair as token ids; the target ends with the stop."""

    prompt: list[int]
    target: list[int]
    source_tokens: int


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
    sizes = Sizes()
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


def tokenize_pair(plm: RemotePlm, task: Task, pair: Pair, *, place: str) -> TokenizedPair:
    """Prompt and target of a pair as token ids.

    Raises:
        InvalidData: the pair has no target, or its target holds the task's stop text.
    """
    if pair.target is None:
        raise InvalidData(f"{place} has no target.", hint="A memory is made of pairs.")
    if task.stop_text and task.stop_text in pair.target:
        raise InvalidData(
            f"The target of {place} contains the stop {task.stop_text!r}, so an answer would end in its middle.",
            hint="Replace it in the texts, or give the task another `stop`.",
        )
    tokenizer = plm.tokenizer
    prompt = task.prompt(pair.source, tokenizer)
    prompt_ids = tokenizer.encode_prompt(prompt)
    target_ids = tokenizer.encode_target(prompt, prompt_ids, task.continuation(pair.target, tokenizer))
    if target_ids[-1] not in task.stop_ids(tokenizer):
        raise InvalidData(
            f"The target of {place} does not end with a stop token of this model.", hint="Give the task another `stop`."
        )
    return TokenizedPair(prompt_ids, target_ids, tokenizer.count(pair.source))


def encode_teacher_forced(plm: RemotePlm, pairs: Sequence[TokenizedPair], *, with_logsumexp: bool) -> MemoryRows:
    """Rows with the contexts c_i = prompt + y_<i. The targets but for their last token go to the server."""
    response = plm.encode(
        [pair.prompt + pair.target[:-1] for pair in pairs],
        [len(pair.prompt) - 1 for pair in pairs],
        with_logsumexp=with_logsumexp,
    )
    return _labelled(response, pairs)


def tokenize_pairs(plm: RemotePlm, tasks: Sequence[Task], pairs: Sequence[Pair], *, place: str) -> list[TokenizedPair]:
    """Pairs as token ids, each with a task of its own, and none too long for the server.

    Raises:
        InvalidData: as `tokenize_pair`, or a pair is too long.
    """
    tokenized = []
    for number, (task, pair) in enumerate(zip(tasks, pairs, strict=True), 1):
        tokenized.append(tokenize_pair(plm, task, pair, place=f"{place} {number}"))
        require_fits(plm, tokenized[-1], place=f"{place} {number}")
    return tokenized


def encode_all(plm: RemotePlm, pairs: Sequence[TokenizedPair], reporter: Reporter) -> MemoryRows:
    """Teacher-forced rows with log-sum-exp of pairs that need no memory on disk."""
    sizes = Sizes()
    for pair in pairs:
        sizes.append(len(pair.prompt) + len(pair.target), len(pair.target))
    parts = []
    with reporter.bar("likelihood of targets", len(pairs), "pairs") as bar:
        for run in plan_requests(sizes, plm.card, plm.dtype, done=0, examples_per_shard=len(pairs)):
            parts.append(encode_teacher_forced(plm, [pairs[i] for i in run], with_logsumexp=True))
            bar.advance(len(run))
    return MemoryRows.concatenate(parts)


def encode_private(plm: RemotePlm, pairs: Sequence[TokenizedPair], stop_ids: frozenset[int]) -> MemoryRows:
    """Rows with the contexts c_i = prompt + the PLM's own greedy continuation ŵ_<i. Only prompts go to the server.

    And, as `look_ahead`, the targets' lengths.
    """
    response = plm.decode([pair.prompt for pair in pairs], [len(pair.target) - 1 for pair in pairs])
    lengths = [len(pair.target) for pair in pairs]
    if response.rows_B.tolist() != lengths:
        raise ProtocolViolation(
            "The server drafted fewer tokens than were asked for.", hint="Nothing was stored; try again."
        )
    contexts = [
        context
        for drafted_T, pair in zip(response.top1_N.split(lengths), pairs, strict=True)
        for context in align(drafted_T.tolist(), pair.target, stop_ids)
    ]
    return replace(
        _labelled(response, pairs),
        context_N=torch.tensor([context.drafted for context in contexts], dtype=torch.int32),
        agrees_N=torch.tensor([context.agrees for context in contexts], dtype=torch.uint8),
        sure_N=torch.tensor([context.sure for context in contexts], dtype=torch.uint8),
    )


def _labelled(response: EncodeResponse | DecodeResponse, pairs: Sequence[TokenizedPair]) -> MemoryRows:
    return MemoryRows(
        cr_N_D=response.cr_N_D,
        target_N=torch.tensor([i for pair in pairs for i in pair.target], dtype=torch.int32),
        rows_E=torch.tensor([len(pair.target) for pair in pairs], dtype=torch.int32),
        source_tokens_E=torch.tensor([pair.source_tokens for pair in pairs], dtype=torch.int32),
        logsumexp_N=response.logsumexp_N,
        last_hidden_N_D=response.last_hidden_N_D,
        cr_scale_N=response.cr_scale_N,
        last_hidden_scale_N=response.last_hidden_scale_N,
    )


def _append_missing(
    memory: ExternalMemory, plm: RemotePlm, pairs: Sequence[Pair], sizes: Sizes, reporter: Reporter
) -> None:
    plan, done = memory.manifest.plan, memory.manifest.examples

    def fetch(run: range) -> MemoryRows:
        chunk = [tokenize_pair(plm, plan.task, pairs[i], place=f"pair {i + 1}") for i in run]
        if plan.context_mode == "private":
            return encode_private(plm, chunk, plan.task.stop_ids(plm.tokenizer))
        return encode_teacher_forced(plm, chunk, with_logsumexp=plan.with_logsumexp)

    runs = list(plan_requests(sizes, plm.card, plan.dtype, done=done, examples_per_shard=plan.examples_per_shard))
    window = Window()
    parts: list[MemoryRows] = []
    # While one request computes on the server, the next are tokenised and on their way, and the last shard is stored.
    with (
        reporter.bar(f"memory {memory.folder.name}", len(pairs), "examples", done=done) as bar,
        plm.observed_by(window.learn),
    ):
        for run, rows in zip(runs, in_order(fetch, runs, window), strict=True):
            parts.append(rows)
            bar.advance(len(run), f"{memory.manifest.rows + sum(len(p.target_N) for p in parts):,} rows")
            if run.stop % plan.examples_per_shard == 0 or run.stop == len(pairs):
                memory.append(MemoryRows.concatenate(parts))
                parts = []


def require_fits(plm: RemotePlm, pair: TokenizedPair, *, place: str, drafted: bool = False) -> None:
    """Refuse a pair that is longer than the server takes, or drafts in one call.

    Raises:
        InvalidData: it is.
    """
    limits = plm.card.limits
    tokens = len(pair.prompt) + len(pair.target)
    if tokens > limits.max_sequence_tokens or len(pair.target) > limits.max_rows:
        raise InvalidData(
            f"{place} has {tokens} tokens with its prompt; the server takes {limits.max_sequence_tokens}.",
            hint="Shorten the text or use fewer examples in the task.",
        )
    if drafted and len(pair.target) - 1 > limits.max_look_ahead:
        raise InvalidData(
            f"The target of {place} has {len(pair.target)} tokens; the server drafts {limits.max_look_ahead}.",
            hint="Shorten the text.",
        )


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

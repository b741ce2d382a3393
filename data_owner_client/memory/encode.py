"""Tokenise training pairs, and have the PLM encode their contexts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from data_owner_client.data.label_tokens import LabelTokenizer
from data_owner_client.data.pairs import Pair, text_of
from data_owner_client.data.reading.problems import InvalidText, Origin, Problems
from data_owner_client.data.stops import StopMatcher, Stops
from data_owner_client.data.tasks import Task
from data_owner_client.memory.alignment import align
from data_owner_client.memory.request_batches import ExampleSizes, split_into_requests
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.plm.tokenizer import PlmTokenizer
from data_owner_client.runtime.progress import Reporter
from protocol.errors import InvalidData, ProtocolViolation
from protocol.messages import DecodeResponse, EncodeResponse


@dataclass(frozen=True)
class TokenizedPair:
    """A pair as token ids.

    Attributes:
        prompt: token ids of the whole prompt.
        target: token ids of the target, of which the last completes a stop.
        source_tokens: length of the bare source text in tokens.
    """

    prompt: list[int]
    target: list[int]
    source_tokens: int


def tokenize_pair(plm: RemotePlm, task: Task, pair: Pair) -> TokenizedPair:
    """Tokenise the prompt and the target of a pair.

    Args:
        plm: the model whose tokenizer is used.
        task: template of the prompt.
        pair: source text and target.

    Raises:
        InvalidData: the pair has no target, an answer would end before the target does, or it would not end behind it.
    """
    _require_texts(pair)
    tokenizer = plm.tokenizer
    prompt, target = task.prompt_and_target(pair, tokenizer)
    prompt_ids = tokenizer.encode_prompt(prompt)
    target_ids = (tokenizer.joint_target if task.format == "chat" else tokenizer.encode_target)(
        prompt, prompt_ids, target
    )
    if target_ids is None:
        raise InvalidText(
            "a token of the whole conversation that spans the end of the prompt and the target",
            hint="Take away space and line breaks at the beginning of the target.",
            origin=pair.origin,
        )
    stops = _stop_matcher(tokenizer, task.stops(tokenizer, plm.card.eos_token_ids))
    if not stops.ends(target_ids):
        raise InvalidText(
            "a target that does not end with a stop of this model",
            hint="Give the task another `stop`.",
            origin=pair.origin,
        )
    if not stops.ids.isdisjoint(target_ids[:-1]):
        raise InvalidText(
            "a target that has a stop of this model before its end",
            hint="Leave such answers out, or give the task another `stop`.",
            origin=pair.origin,
        )
    return TokenizedPair(prompt_ids, target_ids, tokenizer.count(text_of(pair.question)))


def _require_texts(pair: Pair) -> None:
    """Refuse a pair without texts. A tool's result may be empty, and a reply may be calls alone.

    Raises:
        InvalidText: a text is missing.
    """
    if pair.target is None and pair.reply is None:
        raise InvalidText("no target", hint="A memory is made of pairs.", origin=pair.origin)
    texts = [] if pair.conversation else [("source", pair.source)]
    texts += [] if pair.reply else [("target", pair.target or "")]
    for name, text in texts:
        if not text.strip():
            raise InvalidText(f"an empty {name}", hint="Every pair needs two texts.", origin=pair.origin)


@lru_cache(maxsize=16)
def _stop_matcher(tokenizer: PlmTokenizer, stops: Stops) -> StopMatcher:
    return StopMatcher(tokenizer, stops)


def encode_teacher_forced(plm: RemotePlm, pairs: Sequence[TokenizedPair], *, with_logsumexp: bool) -> MemoryRows:
    """Rows with the contexts c_i = prompt + y_<i. The server sees the targets except for their last token."""
    response = plm.encode(
        [pair.prompt + pair.target[:-1] for pair in pairs],
        [len(pair.prompt) - 1 for pair in pairs],
        with_logsumexp=with_logsumexp,
    )
    return _rows(response, pairs)


def tokenize_pairs(plm: RemotePlm, tasks: Sequence[Task], pairs: Sequence[Pair], *, label: str) -> list[TokenizedPair]:
    """Tokenise pairs, each with its task, and refuse those that are too long for the server.

    Args:
        plm: the model whose tokenizer is used.
        tasks: one task for each pair.
        pairs: source texts and targets.
        label: kind of pair in error messages; the number of the pair follows it.

    Raises:
        InvalidData: pairs have no usable target (`tokenize_pair`), or are too long.
    """
    tokenized, problems = [], Problems()
    for number, (task, pair) in enumerate(zip(tasks, pairs, strict=True), 1):
        try:
            tokens = tokenize_pair(plm, task, pair)
            require_fits(plm, tokens)
            tokenized.append(tokens)
        except InvalidData as error:
            problems.add(pair.origin or Origin(label, number, in_file=False), error)
    problems.settle(len(pairs), skip=False)
    return tokenized


def encode_all(plm: RemotePlm, pairs: Sequence[TokenizedPair], reporter: Reporter) -> MemoryRows:
    """Teacher-forced rows with log-sum-exp, for pairs that need no memory on disk."""
    sizes = ExampleSizes()
    for pair in pairs:
        sizes.append(len(pair.prompt) + len(pair.target), len(pair.target))
    parts = []
    with reporter.bar("likelihood of targets", len(pairs), "pairs") as bar:
        for run in split_into_requests(sizes, plm.card, plm.dtype, done=0, examples_per_shard=len(pairs)):
            parts.append(encode_teacher_forced(plm, [pairs[i] for i in run], with_logsumexp=True))
            bar.advance(len(run))
    return MemoryRows.concatenate(parts)


def encode_private(
    plm: RemotePlm, pairs: Sequence[TokenizedPair], stops: StopMatcher, *, least_rows: int = 0
) -> MemoryRows:
    """Rows with the contexts c_i = prompt + ŵ_<i, where ŵ is the PLM's greedy continuation.

    The server sees only the prompts and, as `look_ahead`, the targets' lengths.

    Args:
        plm: the model.
        pairs: pairs as token ids.
        stops: finds the ends of continuations.
        least_rows: rows to request of each pair at least, to conceal the lengths of shorter targets.

    Raises:
        ProtocolViolation: the server drafted fewer tokens than requested.
    """
    requested = [rows_to_request(plm, pair, least_rows) for pair in pairs]
    response = plm.decode([pair.prompt for pair in pairs], [rows - 1 for rows in requested])
    lengths = [len(pair.target) for pair in pairs]
    if response.rows_B.tolist() != requested:
        raise ProtocolViolation(
            "The server drafted fewer tokens than were requested.", hint="Nothing was stored; try again."
        )
    response = _first_rows(response, lengths)
    contexts = [
        context
        for drafted_T, pair in zip(response.top1_N.split(lengths), pairs, strict=True)
        for context in align(drafted_T.tolist(), pair.target, stops.end(drafted_T.tolist()))
    ]
    return replace(
        _rows(response, pairs),
        context_N=torch.tensor([context.draft_index for context in contexts], dtype=torch.int32),
        matches_N=torch.tensor([context.matches for context in contexts], dtype=torch.uint8),
        reliable_N=torch.tensor([context.reliable for context in contexts], dtype=torch.uint8),
    )


def _rows(response: EncodeResponse | DecodeResponse, pairs: Sequence[TokenizedPair]) -> MemoryRows:
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


def rows_to_request(plm: RemotePlm, pair: TokenizedPair, least_rows: int) -> int:
    """Rows that a private memory requests of a pair: one for each token of its target, or more to conceal its length.

    Args:
        plm: the model whose limits apply.
        pair: the pair as token ids.
        least_rows: rows to request at least, where the server's limits allow them.
    """
    limits = plm.card.limits
    most = min(limits.max_look_ahead + 1, limits.max_sequence_tokens - len(pair.prompt) + 1, limits.max_rows)
    return max(len(pair.target), min(least_rows, most))


def rows_that_conceal(plm: RemotePlm, task: Task) -> int:
    """Rows that a private memory requests of each pair at least: of a `classify` task, those of its longest label.

    Its labels are few, so the length of a label could tell which one it is. 0 for the other kinds of task.

    Raises:
        InvalidData: a label cannot be an answer of this task, or the model cannot tell two labels apart.
    """
    if task.kind != "classify":
        return 0
    return max(map(len, LabelTokenizer(plm.tokenizer, task.labels).check(task)))


def _first_rows(response: DecodeResponse, rows: Sequence[int]) -> DecodeResponse:
    """The response with the first rows of each sequence alone."""
    if response.rows_B.tolist() == list(rows):
        return response
    starts = response.rows_B.cumsum(0) - response.rows_B
    index_N = torch.cat([torch.arange(int(at), int(at) + count) for at, count in zip(starts, rows, strict=True)])
    tensors = {
        name: value[index_N]
        for name, value in response
        if isinstance(value, torch.Tensor) and name.removesuffix("_D").endswith("_N")
    }
    return response.model_copy(update={**tensors, "rows_B": torch.tensor(rows)})


def require_fits(plm: RemotePlm, pair: TokenizedPair, *, drafted: bool = False) -> None:
    """Refuse a pair that exceeds the server's limits.

    Args:
        plm: the model whose limits apply.
        pair: the pair as token ids.
        drafted: whether the server must also draft the target's length in one call.

    Raises:
        InvalidData: the pair is too long.
    """
    limits = plm.card.limits
    tokens = len(pair.prompt) + len(pair.target)
    if tokens > limits.max_sequence_tokens or len(pair.target) > limits.max_rows:
        raise InvalidText(
            f"more than {limits.max_sequence_tokens} tokens with its prompt, or {limits.max_rows} in its target",
            hint="Shorten the texts or use fewer examples in the task.",
        )
    if drafted and len(pair.target) - 1 > limits.max_look_ahead:
        raise InvalidText(
            f"more tokens in its target than the server drafts, {limits.max_look_ahead}", hint="Shorten the texts."
        )

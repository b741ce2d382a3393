"""Pairs that fit the model and its server: found, and measured in tokens, before anything is sent."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

from data_owner_client.data.pairs import Pair, PairSelection
from data_owner_client.data.reading.problems import Origin, Problems
from data_owner_client.data.tasks import Task
from data_owner_client.memory.encode import rows_that_conceal, rows_to_request
from data_owner_client.memory.request_batches import ExampleSizes
from data_owner_client.memory.tokenized_pairs import TokenizedPair, require_fits, tokenize_pair
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter
from protocol.errors import InvalidData


@dataclass(frozen=True)
class UsablePairs:
    """Pairs that fit the model and its server.

    Attributes:
        pairs: the pairs.
        sizes: their token counts.
        target_ids: ids of the different tokens in their targets.
        shown: the pairs with surrogates, of a redacted memory; None in other memories.
    """

    pairs: Sequence[Pair]
    sizes: ExampleSizes
    target_ids: set[int]
    shown: Sequence[Pair] | None = None


def find_usable_pairs(
    plm: RemotePlm,
    task: Task,
    pairs: Sequence[Pair],
    problems: Problems,
    *,
    drafted: bool,
    shown: Sequence[Pair] | None = None,
    reporter: Reporter,
) -> UsablePairs:
    """Tokenise all pairs once, and leave out those that cannot be used.

    Args:
        plm: the model whose tokenizer is used and whose limits apply.
        task: template of the prompts.
        pairs: all pairs.
        problems: receives the problems of the others.
        drafted: whether the server must also draft the length of each target in one call.
        shown: the pairs with surrogates, of a redacted memory; None in other memories.
        reporter: receives the progress.
    """
    index_N, sizes, target_ids = array("q"), ExampleSizes(), set[int]()
    least_rows = rows_that_conceal(plm, task) if drafted else 0
    for index, tokens in _each_usable(plm, task, pairs, problems, drafted=drafted, shown=shown, reporter=reporter):
        index_N.append(index)
        rows = rows_to_request(plm, tokens, least_rows) if drafted else len(tokens.teacher_forced)
        sizes.append(len(tokens.prompt) + rows, rows)
        target_ids.update(tokens.target)
    usable_shown = None if shown is None else PairSelection(shown, index_N)
    return UsablePairs(PairSelection(pairs, index_N), sizes, target_ids, usable_shown)


def tokenize_usable(
    plm: RemotePlm, task: Task, pairs: Sequence[Pair], *, skip_invalid: bool, reporter: Reporter
) -> tuple[Sequence[Pair], list[TokenizedPair]]:
    """The pairs that can be used and their token ids, for pairs that need no memory on disk.

    Raises:
        InvalidData: some cannot be used and `skip_invalid` is False, or none can.
    """
    problems = Problems()
    usable = [*_each_usable(plm, task, pairs, problems, drafted=False, reporter=reporter)]
    problems.settle(len(pairs), skip=skip_invalid)
    return PairSelection(pairs, [index for index, _ in usable]), [tokens for _, tokens in usable]


def _each_usable(
    plm: RemotePlm,
    task: Task,
    pairs: Sequence[Pair],
    problems: Problems,
    *,
    drafted: bool,
    shown: Sequence[Pair] | None = None,
    reporter: Reporter,
) -> Iterator[tuple[int, TokenizedPair]]:
    """The indices of the pairs that can be used, and their token ids."""
    all_shown: Iterable[Pair | None] = repeat(None, len(pairs)) if shown is None else shown
    with reporter.bar("tokenising", len(pairs), "pairs") as bar:
        for index, (pair, shown_pair) in enumerate(zip(pairs, all_shown, strict=True)):
            try:
                tokens = tokenize_pair(plm, task, pair, shown_pair)
                require_fits(plm, tokens, drafted=drafted)
            except InvalidData as error:
                problems.add(pair.origin or Origin("pair", index + 1, in_file=False), error)
            else:
                yield index, tokens
            bar.advance(1)


def require_usable(
    plm: RemotePlm,
    task: Task,
    parts: Sequence[Sequence[Pair]],
    *,
    drafted: bool,
    skip_invalid: bool,
    reporter: Reporter,
) -> list[Sequence[Pair]]:
    """The pairs of all parts, without those that cannot be used if `skip_invalid`; see `find_usable_pairs`.

    Raises:
        InvalidData: some cannot be used and `skip_invalid` is False, or none can.
    """
    problems = Problems()
    usable = [find_usable_pairs(plm, task, part, problems, drafted=drafted, reporter=reporter).pairs for part in parts]
    problems.settle(sum(map(len, parts)), skip=skip_invalid)
    return usable

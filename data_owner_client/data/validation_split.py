"""Split of pairs for validation: what belongs together stays on one side."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from data_owner_client.data.pairs import Pair, PairSelection, hash_text, texts_of
from protocol.errors import InvalidData

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NO_GROUP = 0


def split_validation(
    pairs: Sequence[Pair], fraction: float, max_sources: int = 300
) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """Set some pairs aside for validation, at least one. Hashes of the texts decide.

    Pairs of one group stay together, and so do pairs with the same question. The question is a pair's source without a
    system turn, and behind earlier answers the whole conversation. If all pairs belong together so, such as all
    questions on one text, the question alone decides.

    Args:
        pairs: all pairs.
        fraction: share of the pairs to set aside, 0 to 1.
        max_sources: upper bound of the distinct questions that are set aside. A single group may have more.

    Returns:
        The pairs to train on, and the pairs set aside.

    Raises:
        InvalidData: there are fewer than two different questions.
    """
    import numpy as np  # not at the top: the command line's help need not wait for it

    # Sixteen bytes for each pair, however long the texts are.
    question_N, group_N = array("Q"), array("Q")
    for pair in pairs:
        question_N.append(hash_text(_question(pair)))
        group_N.append(hash_text(pair.group) if pair.group else _NO_GROUP)
    questions, groups = np.asarray(question_N), np.asarray(group_N)  # without a copy
    parts = _parts(questions, groups)
    if len(parts.questions_P) < 2:
        parts = _parts(questions, np.zeros_like(groups))
    if len(parts.questions_P) < 2:
        raise InvalidData(
            f"{len(pairs)} pairs with {len(parts.questions_P)} different sources are too few to set some aside for "
            "validation.",
            hint="Give pairs with other sources, or a file for --validation.",
        )
    count = max(1, min(max_sources, round(fraction * len(pairs)), int(parts.questions_P.sum()) // 2))
    held_out_N = _held_out(parts, count)[parts.part_N]
    train, held_out = (array("q", np.flatnonzero(mask_N).tobytes()) for mask_N in (~held_out_N, held_out_N))
    return PairSelection(pairs, train), PairSelection(pairs, held_out)


class _Parts(NamedTuple):
    """The parts into which pairs fall, P of them.

    Attributes:
        part_N: part of each pair.
        hash_P: hash of each part, which does not depend on the order of the pairs.
        questions_P: number of distinct questions in each part.
    """

    part_N: NDArray[np.int64]
    hash_P: NDArray[np.uint64]
    questions_P: NDArray[np.int64]


def _parts(question_N: NDArray[np.uint64], group_N: NDArray[np.uint64]) -> _Parts:
    """The connected components of the pairs, where pairs with one question or one group are neighbours."""
    import numpy as np

    question_Q, at_N = np.unique(question_N, return_inverse=True)
    grouped_N = group_N != _NO_GROUP
    if not grouped_N.any():
        return _Parts(at_N, question_Q, np.ones(len(question_Q), np.int64))
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    group_G, group_at = np.unique(group_N[grouped_N], return_inverse=True)
    nodes = len(question_Q) + len(group_G)
    edges = (at_N[grouped_N].astype(np.int32), (len(question_Q) + group_at).astype(np.int32))
    graph = coo_array((np.ones(len(group_at), np.int8), edges), shape=(nodes, nodes))
    count, part_of_node = connected_components(graph, directed=False)
    part_Q = part_of_node[: len(question_Q)]
    hash_P = np.full(count, np.iinfo(np.uint64).max)
    np.minimum.at(hash_P, part_Q, question_Q)
    questions_P = np.bincount(part_Q, minlength=count)
    # The least of many hashes is small, so large parts would always be the first.
    for part in np.flatnonzero(questions_P > 1):
        hash_P[part] = hash_text(str(hash_P[part]))
    return _Parts(part_Q[at_N], hash_P, questions_P)


def _held_out(parts: _Parts, count: int) -> NDArray[np.bool_]:
    """A mask of the parts that are set aside: with the lowest hashes, and at most `count` questions if one fits."""
    import numpy as np

    held_out_P = np.zeros(len(parts.hash_P), bool)
    order_P = np.argsort(parts.hash_P, kind="stable")
    left = count
    for part in order_P:
        if parts.questions_P[part] <= left:
            held_out_P[part] = True
            left -= int(parts.questions_P[part])
        if not left:
            break
    if left == count:
        held_out_P[order_P[np.argmin(parts.questions_P[order_P])]] = True
    return held_out_P


def _question(pair: Pair) -> str:
    conversation = pair.conversation
    if conversation is None:
        return pair.source
    if conversation.has_answers:
        return json.dumps(conversation.turns)
    return texts_of(conversation)[-1]

"""Worked examples for each prompt of its own: the pairs of a memory whose sources are most like the text at hand.

The PLM's owner sees them, targets and all, so they are for memories whose targets it has seen anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_owner_client.data.pairs import Pair
from data_owner_client.data.tasks import Shot, Task
from data_owner_client.plm.remote_plm import RemotePlm

_AT_ONCE = 256


def with_retrieved_examples(
    plm: RemotePlm, task: Task, sources: Sequence[str], nearest: ExampleRetriever | None
) -> list[Task]:
    """The task of each text: with the examples nearest to it in its prompt, or, without `nearest`, as it is."""
    if nearest is None:
        return [task] * len(sources)
    return [_with_examples(plm, task, *each) for each in zip(sources, nearest.retrieve(sources), strict=True)]


class ExampleRetriever:
    """Finds pairs by the likeness of their sources, by the TF-IDF weights of pieces of words.

    The product of two texts' weights is divided by the square root of the pair's length alone, not by its length: the
    cosine would prefer short pairs, behind which the PLM answers too shortly (pivoted length normalisation, Singhal et
    al., SIGIR 1996).

    Args:
        pairs: with targets.
        count: how many to find for a text; at most all.
    """

    def __init__(self, pairs: Sequence[Pair], count: int) -> None:
        # Here, because it takes a second that most commands need not wait for.
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._pairs = list(pairs)
        self._count = min(count, len(self._pairs))
        self._vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, norm=None)
        weights_N_G = self._vectorizer.fit_transform([pair.source for pair in self._pairs])
        length_N = np.sqrt(np.asarray(weights_N_G.multiply(weights_N_G).sum(axis=1)).ravel())
        self._weights = weights_N_G.multiply(np.maximum(length_N, 1e-9)[:, None] ** -0.5).T.tocsr()

    def examples(self, sources: Sequence[str]) -> list[tuple[Shot, ...]]:
        """For each text the pairs most like it, the likest last; never one with that very source."""
        found: list[tuple[Shot, ...]] = []
        for start in range(0, len(sources), _AT_ONCE):
            some = sources[start : start + _AT_ONCE]
            likeness_B_N = (self._vectorizer.transform(some) @ self._weights).toarray()
            for source, likeness_N in zip(some, likeness_B_N, strict=True):
                # A stable sort: the same examples in every run, also among equals.
                order = np.argsort(-likeness_N, kind="stable")[: self._count + 1]
                nearest = [self._pairs[i] for i in order if self._pairs[i].source != source][: self._count]
                found.append(tuple(Shot(source=p.source, target=p.target or "") for p in reversed(nearest)))
        return found


def _with_examples(plm: RemotePlm, task: Task, source: str, examples: Sequence[Shot]) -> Task:
    """The task with other examples in its prompt: as many of the last as leave half of the server's limit free."""
    tokenizer, most = plm.tokenizer, plm.card.limits.max_sequence_tokens // 2
    for first in range(len(examples)):
        own = task.model_copy(update={"examples": tuple(examples[first:])})
        if len(tokenizer.encode_prompt(own.prompt(source, tokenizer))) <= most:
            return own
    return task

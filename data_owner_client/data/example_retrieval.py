"""Retrieval of in-context examples: for each text, the pairs of a memory with the most similar sources.

The PLM's owner sees these pairs with their targets. They are for memories whose targets the owner has seen anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_owner_client.data.pairs import Pair, Source, is_single_question, text_of
from data_owner_client.data.tasks import Shot, Task
from data_owner_client.plm.remote_plm import RemotePlm

_BATCH_TEXTS = 256


def with_retrieved_examples(
    plm: RemotePlm, task: Task, sources: Sequence[Source], retriever: ExampleRetriever | None
) -> list[Task]:
    """A task for each source, with the examples retrieved for it; the unchanged task if `retriever` is None.

    A conversation of several turns gets the unchanged task, because examples would read as turns of it.
    """
    tasks = [task] * len(sources)
    if retriever is None:
        return tasks
    numbers = [number for number, source in enumerate(sources) if is_single_question(source)]
    retrieved = retriever.retrieve([text_of(sources[number]) for number in numbers])
    for number, examples in zip(numbers, retrieved, strict=True):
        tasks[number] = _with_examples(plm, task, sources[number], examples)
    return tasks


class ExampleRetriever:
    """Finds the pairs whose sources are most similar to a text, by TF-IDF over character n-grams.

    The score is the dot product of the weights, divided by the square root of the norm of the pair's weights. Division
    by the norm itself (the cosine) prefers short pairs, after which the PLM answers too briefly. See pivoted length
    normalisation, Singhal et al., SIGIR 1996.

    Args:
        pairs: pairs to search; each must have a target. Those that depend on earlier turns or on tools are left out, so
            that no answer of a conversation becomes an example for the same conversation.
        count: number of pairs to retrieve for a text; all pairs if there are fewer.
    """

    def __init__(self, pairs: Sequence[Pair], count: int) -> None:
        # Imported here because it takes a second, and most commands do not need it.
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._pairs = [pair for pair in pairs if is_single_question(pair.question) and pair.reply is None]
        self._sources = [text_of(pair.question) for pair in self._pairs]
        self._count = min(count, len(self._pairs))
        if not self._pairs:
            return
        self._vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, norm=None)
        weights_N_F = self._vectorizer.fit_transform(self._sources)
        norm_N = np.sqrt(np.asarray(weights_N_F.multiply(weights_N_F).sum(axis=1)).ravel())
        self._weights = weights_N_F.multiply(np.maximum(norm_N, 1e-9)[:, None] ** -0.5).T.tocsr()

    def retrieve(self, sources: Sequence[str]) -> list[tuple[Shot, ...]]:
        """The most similar pairs for each text, the most similar last. Pairs with the same source are left out."""
        retrieved: list[tuple[Shot, ...]] = []
        if not self._pairs:
            return [()] * len(sources)
        for start in range(0, len(sources), _BATCH_TEXTS):
            batch = sources[start : start + _BATCH_TEXTS]
            score_B_N = (self._vectorizer.transform(batch) @ self._weights).toarray()
            for source, score_N in zip(batch, score_B_N, strict=True):
                # A stable sort gives the same examples in every run, also among ties.
                order = np.argsort(-score_N, kind="stable")[: self._count + 1]
                nearest = [i for i in order if self._sources[i] != source][: self._count]
                retrieved.append(tuple(map(self._shot, reversed(nearest))))
        return retrieved

    def _shot(self, number: int) -> Shot:
        return Shot(source=self._sources[number], target=self._pairs[number].target or "")


def _with_examples(plm: RemotePlm, task: Task, source: Source, examples: Sequence[Shot]) -> Task:
    """The task with other examples: as many of the last ones as leave half of the server's token limit free."""
    tokenizer, max_tokens = plm.tokenizer, plm.card.limits.max_sequence_tokens // 2
    for first in range(len(examples)):
        candidate = task.model_copy(update={"examples": tuple(examples[first:])})
        if len(tokenizer.encode_prompt(candidate.prompt(source, tokenizer))) <= max_tokens:
            return candidate
    return task

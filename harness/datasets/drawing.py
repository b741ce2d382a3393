"""Drawing of examples: as many of each class as there are, and none that is nearly another one."""

from __future__ import annotations

import random
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import chain, islice, zip_longest
from typing import TypeVar

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)
_BLOCK = 512


def draw_evenly(classes: Mapping[Key, Iterable[Item]], count: int, rng: random.Random) -> list[Item]:
    """At most `count` items, the same number of each class until a class has no more, in random order.

    Args:
        classes: the items of each class; the first ones are taken, and no more than needed are asked for.
        count: number of items.
        rng: source of the order.
    """
    # Each item in a tuple of its own, so that nothing stands for what a class no longer has.
    rounds = zip_longest(*(((item,) for item in pool) for pool in classes.values()), fillvalue=())
    drawn = list(islice(chain.from_iterable(chain.from_iterable(rounds)), count))
    rng.shuffle(drawn)
    return drawn


def groups_of_similar_texts(texts: Sequence[str], similarity: float) -> list[int]:
    """A number for each text; texts that are similar, if through others, have the same.

    Texts are similar if the cosine of their TF-IDF vectors (words and pairs of words) is at least `similarity`.
    """
    import numpy as np
    from scipy.sparse import csr_matrix, vstack
    from scipy.sparse.csgraph import connected_components
    from sklearn.feature_extraction.text import TfidfVectorizer

    rows = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, tokenizer=re.compile(r"\w+").findall, token_pattern=None
    ).fit_transform(texts)
    blocks = []
    for start in range(0, rows.shape[0], _BLOCK):
        cosine = (rows[start : start + _BLOCK] @ rows.T).tocoo()
        near = cosine.data >= similarity
        shape = (min(_BLOCK, rows.shape[0] - start), rows.shape[0])
        blocks.append(csr_matrix((np.ones(near.sum()), (cosine.row[near], cosine.col[near])), shape=shape))
    _, group_N = connected_components(vstack(blocks), directed=False)
    return [int(group) for group in group_N]


def without_near_duplicates(texts: Sequence[str], similarity: float) -> list[int]:
    """The index of the first text of each group of similar texts, in order."""
    first: dict[int, int] = {}
    for index, group in enumerate(groups_of_similar_texts(texts, similarity)):
        first.setdefault(group, index)
    return list(first.values())

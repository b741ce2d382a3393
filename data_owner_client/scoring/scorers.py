"""The scorer of a task, and the references of a pair."""

from __future__ import annotations

from collections.abc import Sequence

from data_owner_client.data.pairs import Pair
from data_owner_client.data.reading.problems import InvalidText
from data_owner_client.data.tasks import Task
from data_owner_client.scoring.rewrite import RewriteScorer
from data_owner_client.scoring.scorer import References, Scorer
from data_owner_client.scoring.settings import DEFAULT_SCORING, ScoringSettings


def scorer_for(task: Task, references: Sequence[References], settings: ScoringSettings = DEFAULT_SCORING) -> Scorer:
    """The scorer of a task's kind.

    Args:
        task: the task; a `classify` task without labels has those of the references.
        references: accepted answers to each text of the test set.
        settings: settings of scores.

    Raises:
        InvalidData: a package is missing, or a reference is no answer of the task.
    """
    return RewriteScorer(references, settings)


def references_of(pair: Pair) -> References:
    """The accepted answers of a pair; the first is its target.

    Raises:
        InvalidText: the pair has no target.
    """
    if pair.target is None:
        raise InvalidText("no target", hint="Scores need an answer to each text.", origin=pair.origin)
    return (pair.target, *pair.references)

"""The scorer of a task, and the references of a pair."""

from __future__ import annotations

from collections.abc import Sequence

from data_owner_client.data.pairs import Pair
from data_owner_client.data.reading.problems import InvalidText
from data_owner_client.data.tasks import Task
from data_owner_client.plm.tokenizer import PlmTokenizer
from data_owner_client.scoring.answers import AnswerScorer
from data_owner_client.scoring.classification import ClassificationScorer
from data_owner_client.scoring.extraction import ExtractionScorer
from data_owner_client.scoring.rewrite import ChatScorer, RewriteScorer
from data_owner_client.scoring.scorer import References, Scorer
from data_owner_client.scoring.settings import DEFAULT_SCORING, ScoringSettings
from data_owner_client.scoring.summaries import SummaryScorer


def scorer_for(task: Task, references: Sequence[References], settings: ScoringSettings = DEFAULT_SCORING) -> Scorer:
    """The scorer of a task's kind.

    Args:
        task: the task; a `classify` task without labels has those of the references.
        references: accepted answers to each text of the test set.
        settings: settings of scores.

    Raises:
        InvalidData: the tokenizer of BLEU is not installed, or a reference of `extract` is neither JSON nor slots.
        Unsupported: the task is `summarise`, and the package rouge-score is not installed.
    """
    match task.kind:
        case "rewrite":
            return RewriteScorer(references, settings)
        case "classify":
            return ClassificationScorer(references, task.labels)
        case "extract":
            return ExtractionScorer(references, task.answer_schema)
        case "answer":
            return AnswerScorer(references, task.language)
        case "summarise":
            return SummaryScorer(references, task.language)
        case "chat":
            return ChatScorer(references)


def references_of(pair: Pair, task: Task | None = None, tokenizer: PlmTokenizer | None = None) -> References:
    """The accepted answers of a pair; the first is its target, or its tool calls as the model writes them.

    Args:
        pair: the pair.
        task: the task, which writes tool calls; None if there are none.
        tokenizer: the model's tokenizer, whose chat template writes them; None if there are none.

    Raises:
        InvalidText: the pair has no target, or tool calls whose text depends on a model.
        InvalidData: the model's template does not write the pair.
    """
    if pair.reply is not None and task is not None and tokenizer is not None:
        return (task.reference(pair, tokenizer), *pair.references)
    if pair.reply is not None:
        raise InvalidText(
            "tool calls, whose text depends on the model", hint="Leave such answers out.", origin=pair.origin
        )
    if pair.target is None:
        raise InvalidText("no target", hint="Scores need an answer to each text.", origin=pair.origin)
    return (pair.target, *pair.references)

"""Scores of the PLM alone and with an adapter, on a test set."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import partial

from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.data.earlier_answers import without_earlier_answers
from data_owner_client.data.example_retrieval import with_retrieved_examples
from data_owner_client.data.pairs import Pair, list_of_pairs
from data_owner_client.data.reading.problems import Origin, Problems
from data_owner_client.data.tasks import Task
from data_owner_client.data.tasks.kinds import answer_text
from data_owner_client.decoding.client_drafts import NgramDrafter
from data_owner_client.decoding.generation import translate
from data_owner_client.decoding.settings import DEFAULT_DECODING, DecodingSettings, Effort
from data_owner_client.decoding.stats import GenerationStats
from data_owner_client.evaluation.details import Details, details_of
from data_owner_client.evaluation.perplexity import Perplexities, perplexities
from data_owner_client.evaluation.task_metrics import TaskMetrics
from data_owner_client.memory.encode import encode_all
from data_owner_client.memory.tokenized_pairs import TokenizedPair, tokenize_pairs
from data_owner_client.memory.usable_pairs import require_usable, tokenize_usable
from data_owner_client.plm.identity import ModelIdentity
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.arguments import require_loaded
from data_owner_client.runtime.progress import Reporter
from data_owner_client.scoring.scorers import references_of, scorer_for
from data_owner_client.scoring.settings import DEFAULT_SCORING, ScoringSettings
from protocol.errors import InvalidData


class AnswerScores(TaskMetrics):
    """Scores of answers to the texts of a test set.

    Attributes:
        scores: scores by key of the metric.
        details: details of this kind of task; None if it has none.
    """

    scores: dict[str, float]
    details: Details | None


class Evaluation(TaskMetrics):
    """Scores of the PLM alone and with the adapter, on the same pairs.

    Attributes:
        plm: scores of the PLM alone, by key of the metric.
        pema: scores with the adapter, by key of the metric.
        p_values: p-values of the difference between both, by key of the metric, from paired bootstrap resampling.
        plm_details: details of the PLM's answers that this kind of task has; None if it has none.
        pema_details: such details of the answers with the adapter.
        perplexity: perplexities of the targets; None if these were not shared with the owner.
        sources: source texts, without those that were left out.
        targets: targets of the sources.
        plm_texts: texts of the PLM alone, in the order of the sources.
        pema_texts: texts with the adapter, in the order of the sources.
        plm_usage: calls, tokens and bytes of the texts of the PLM alone.
        pema_usage: calls, tokens and bytes of the texts with the adapter.
        seconds: duration of each part, by name.
    """

    plm: dict[str, float]
    pema: dict[str, float]
    p_values: dict[str, float]
    plm_details: Details | None
    pema_details: Details | None
    perplexity: Perplexities | None
    sources: list[str]
    targets: list[str]
    plm_texts: list[str]
    pema_texts: list[str]
    plm_usage: GenerationStats
    pema_usage: GenerationStats
    seconds: dict[str, float]


def score_answers(
    task: Task, pairs: Iterable[Pair], answers: Sequence[str], scoring: ScoringSettings = DEFAULT_SCORING
) -> AnswerScores:
    """Score answers of any system by the metrics of the task's kind.

    Args:
        task: the task.
        pairs: sources with their targets.
        answers: an answer to each source.
        scoring: settings of the scores.

    Raises:
        InvalidData: a pair has no target, or is no pair of the task, or the metrics need a package that is missing.
    """
    pairs = list_of_pairs(pairs)
    references = [references_of(pair) for pair in pairs]
    _require_answers(task, pairs)
    scorer = scorer_for(task, references, scoring)
    return AnswerScores(
        **vars(TaskMetrics.of(task, scorer)),
        scores=scorer.scores(answers),
        details=details_of(scorer, references, answers),
    )


def _require_answers(task: Task, pairs: Sequence[Pair]) -> None:
    """Require targets of the task's kind.

    Raises:
        InvalidData: a target is none.
    """
    problems = Problems()
    for index, pair in enumerate(pairs):
        try:
            answer_text(task.kind, task.labels, task.answer_schema, pair.target or "")
        except InvalidData as error:
            problems.add(pair.origin or Origin("pair", index + 1, in_file=False), error)
    problems.settle(len(pairs), skip=False)


def evaluate(
    plm: RemotePlm,
    pairs: Iterable[Pair],
    adapter: CandidateDistribution,
    *,
    interpolation: Interpolation | None = None,
    share_targets: bool = False,
    share_earlier_answers: bool = False,
    decoding: DecodingSettings = DEFAULT_DECODING,
    lookup: NgramDrafter | None = None,
    consensus: int = 0,
    beams: int = 1,
    length_penalty: float = 1.0,
    effort: Effort | None = None,
    scoring: ScoringSettings = DEFAULT_SCORING,
    skip_invalid: bool = False,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Answer the sources with the PLM alone and with the adapter, and score both by the metrics of the task's kind.

    The answers are scored on this machine. Perplexity shows the targets to the PLM's owner, so it is computed only with
    `share_targets`.

    Args:
        plm: the PLM.
        pairs: sources with their targets.
        adapter: the adapter, or a baseline in its place.
        interpolation: interpolation with the PLM; None for that of the adapter's card.
        share_targets: send the targets to the PLM's owner, for perplexities.
        share_earlier_answers: consent to show earlier answers of conversations in the prompts for later ones. Without
            it and without `share_targets`, only answers are scored whose prompts show none.
        decoding: settings of decoding.
        lookup: gives drafts for the adapter's texts; None for no such drafts.
        consensus: number of texts drawn for each source with the adapter, of which the most typical one is returned;
            0 for the most probable text.
        beams: beams of a beam search with the adapter; 1 for none.
        length_penalty: exponent of the length in the scores of beams.
        effort: `low`, `medium` or `high` in place of the three (`GenerationOptions`); None for what they say.
        scoring: settings of the scores.
        skip_invalid: leave out pairs that cannot be used, and log how many there are.
        reporter: shows the progress.

    Raises:
        InvalidData: there is no pair, a pair has no target, or does not fit the model or the task, or the metrics need
            a package that is missing.
        IdentityMismatch: the adapter was trained with another model.
        PemaError: a call to the PLM failed.
    """
    require_loaded(adapter, "The adapter", "TrainedAdapter.load(path)")
    adapter.card.model.require(ModelIdentity.from_card(plm.card), "The adapter", "the server")
    pairs = list_of_pairs(pairs)
    task, interpolation = adapter.card.task, interpolation or adapter.card.interpolation
    reporter = reporter or Reporter()
    if not (share_targets or share_earlier_answers):
        (pairs,) = without_earlier_answers([pairs], reporter)
    tokenized: list[list[TokenizedPair]] = []
    if share_targets:
        pairs, tokens = tokenize_usable(plm, task, pairs, skip_invalid=skip_invalid, reporter=reporter)
        tokenized.append(tokens)
    else:
        (pairs,) = require_usable(plm, task, [pairs], drafted=False, skip_invalid=skip_invalid, reporter=reporter)
    if not pairs:
        raise InvalidData("There are no pairs to evaluate on.", hint="Give at least one.")
    sources = [pair.question for pair in pairs]
    # Whatever can fail should fail before the long work.
    references = [references_of(pair, task, plm.tokenizer) for pair in pairs]
    scorer = scorer_for(task, references, scoring)
    if share_targets and adapter.retriever:
        tasks = with_retrieved_examples(plm, task, sources, adapter.retriever)
        tokenized.append(tokenize_pairs(plm, tasks, pairs, label="pair"))

    answers = partial(
        translate, plm, sources, task=task, interpolation=interpolation, decoding=decoding, reporter=reporter
    )
    # The adapter's first, as its options may contradict each other.
    adapted = answers(
        adapter=adapter,
        lookup=lookup,
        consensus=consensus,
        beams=beams,
        length_penalty=length_penalty,
        effort=effort,
    )
    alone = answers()
    started = time.perf_counter()
    perplexity = None
    if share_targets:
        rows = [encode_all(plm, part, reporter) for part in tokenized]
        perplexity = perplexities(plm, adapter, rows[0], interpolation, *rows[1:])
    seconds = {
        "translate_plm": alone.seconds,
        "translate": adapted.seconds,
        "perplexity": time.perf_counter() - started,
    }
    (p_values,) = scorer.p_values(alone.texts, [adapted.texts])
    return Evaluation(
        **vars(TaskMetrics.of(task, scorer)),
        plm=scorer.scores(alone.texts),
        pema=scorer.scores(adapted.texts),
        p_values=p_values,
        plm_details=details_of(scorer, references, alone.texts, alone.label_probabilities),
        pema_details=details_of(scorer, references, adapted.texts, adapted.label_probabilities),
        perplexity=perplexity,
        sources=[pair.source for pair in pairs],
        targets=[texts[0] for texts in references],
        plm_texts=alone.texts,
        pema_texts=adapted.texts,
        plm_usage=alone.stats,
        pema_usage=adapted.stats,
        seconds=seconds,
    )

"""Scores of the PLM alone and with an adapter, on a test set."""

from __future__ import annotations

import time
from collections.abc import Iterable

from pydantic import BaseModel

from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.data.example_retrieval import with_retrieved_examples
from data_owner_client.data.pairs import Pair, list_of_pairs
from data_owner_client.decoding.client_drafts import NgramDrafter
from data_owner_client.decoding.generation import Generation, translate
from data_owner_client.decoding.settings import DEFAULT_DECODING, DecodingSettings
from data_owner_client.evaluation.perplexity import Perplexities, perplexities
from data_owner_client.memory.encode import TokenizedPair, encode_all, tokenize_pairs
from data_owner_client.memory.usable_pairs import require_usable
from data_owner_client.plm.identity import ModelIdentity
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.arguments import require_loaded
from data_owner_client.runtime.progress import Reporter
from data_owner_client.scoring.settings import DEFAULT_SCORING, ScoringSettings
from data_owner_client.scoring.text_metrics import TextScores, bleu_tokenizer, text_scores
from protocol.errors import InvalidData


class Evaluation(BaseModel):
    """Scores of the PLM alone and with the adapter, on the same pairs.

    Attributes:
        plm: scores of the PLM alone.
        pema: scores with the adapter.
        perplexity: perplexities of the targets; None if these were not shared with the owner.
        plm_texts: texts of the PLM alone, in the order of the pairs.
        pema_texts: texts with the adapter, in the order of the pairs.
        seconds: duration of each part, by name.
    """

    plm: TextScores
    pema: TextScores
    perplexity: Perplexities | None
    plm_texts: list[str]
    pema_texts: list[str]
    seconds: dict[str, float]


def evaluate(
    plm: RemotePlm,
    pairs: Iterable[Pair],
    adapter: CandidateDistribution,
    *,
    interpolation: Interpolation | None = None,
    share_targets: bool = False,
    decoding: DecodingSettings = DEFAULT_DECODING,
    lookup: NgramDrafter | None = None,
    consensus: int = 0,
    scoring: ScoringSettings = DEFAULT_SCORING,
    skip_invalid: bool = False,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Translate the sources with the PLM alone and with the adapter, and score both against the targets.

    The texts are scored on this machine. Perplexity shows the targets to the PLM's owner, so it is computed only with
    `share_targets`.

    Args:
        plm: the PLM.
        pairs: sources with their targets.
        adapter: the adapter, or a baseline in its place.
        interpolation: interpolation with the PLM; None for that of the adapter's card.
        share_targets: send the targets to the PLM's owner, for perplexities.
        decoding: settings of decoding.
        lookup: gives drafts for the adapter's texts; None for no such drafts.
        consensus: number of texts drawn for each source with the adapter, of which the most typical one is returned;
            0 for the most probable text.
        scoring: settings of the scores.
        skip_invalid: leave out pairs that cannot be used, and log how many there are.
        reporter: shows the progress.

    Raises:
        InvalidData: there is no pair, a pair has no target, or does not fit the model, or the tokenizer of BLEU is not
            installed.
        IdentityMismatch: the adapter was trained with another model.
        PemaError: a call to the PLM failed.
    """
    require_loaded(adapter, "The adapter", "TrainedAdapter.load(path)")
    pairs = list_of_pairs(pairs)
    task, interpolation = adapter.card.task, interpolation or adapter.card.interpolation
    reporter = reporter or Reporter()
    if skip_invalid or share_targets:
        (pairs,) = require_usable(plm, task, [pairs], drafted=False, skip_invalid=skip_invalid, reporter=reporter)
    if not pairs:
        raise InvalidData("There are no pairs to evaluate on.", hint="Give at least one.")
    sources, references = [pair.question for pair in pairs], [_target(pair) for pair in pairs]

    def run(with_adapter: CandidateDistribution | None) -> Generation:
        return translate(
            plm,
            sources,
            adapter=with_adapter,
            task=task,
            interpolation=interpolation,
            decoding=decoding,
            lookup=lookup if with_adapter else None,
            consensus=consensus if with_adapter else 0,
            reporter=reporter,
        )

    # Whatever can fail should fail before the long work.
    adapter.card.model.require(ModelIdentity.from_card(plm.card), "The adapter", "the server")
    tokenizer = bleu_tokenizer(references, scoring)
    tokenized: list[list[TokenizedPair]] = []
    if share_targets:
        tokenized = [
            tokenize_pairs(plm, with_retrieved_examples(plm, task, sources, retriever), pairs, label="pair")
            for retriever in ([None, adapter.retriever] if adapter.retriever else [None])
        ]
    alone, adapted = run(None), run(adapter)
    started = time.perf_counter()
    perplexity = None
    if share_targets:
        rows = [encode_all(plm, part, reporter) for part in tokenized]
        perplexity = perplexities(plm, adapter, rows[0], interpolation, *rows[1:])
    return Evaluation(
        plm=text_scores(alone.texts, references, tokenizer),
        pema=text_scores(adapted.texts, references, tokenizer),
        perplexity=perplexity,
        plm_texts=alone.texts,
        pema_texts=adapted.texts,
        seconds={
            "translate_plm": alone.seconds,
            "translate": adapted.seconds,
            "perplexity": time.perf_counter() - started,
        },
    )


def _target(pair: Pair) -> str:
    if pair.target is None:
        raise InvalidData("A pair has no target.", hint="Evaluation needs references.")
    return pair.target

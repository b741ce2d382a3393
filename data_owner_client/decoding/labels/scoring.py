"""Exact probabilities of labels in the mixture, without draws: the tree of labels is computed where it matters.

log P(label) is the sum of log((1 − λ_t)·P_PLM + λ_t·P_PEMA) over the label's tokens and the end behind them. It is not
divided by the number of tokens, as in the metric `acc` of EleutherAI's lm-evaluation-harness.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.data.label_tokens import LabelIds
from data_owner_client.decoding.decode_loop import PLM_ONLY
from data_owner_client.decoding.labels.evidence import LabelEvidence
from data_owner_client.decoding.labels.requests import LabelRequest
from data_owner_client.decoding.labels.tree_scorer import TreeScorer
from data_owner_client.decoding.labels.trie import LabelTrie
from data_owner_client.decoding.settings import DEFAULT_DECODING, LABEL_TOLERANCE, DecodingSettings
from data_owner_client.decoding.stats import GenerationStats
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter


@dataclass(frozen=True)
class ScoredLabels:
    """Evidence for some of the requests, whose labels have the same token ids.

    Attributes:
        numbers: index of the request of each text.
        evidence: evidence for these texts.
    """

    numbers: list[int]
    evidence: LabelEvidence


def score_labels(
    plm: RemotePlm,
    requests: Sequence[LabelRequest],
    labels: Sequence[str],
    *,
    adapter: CandidateDistribution | None = None,
    interpolations: Sequence[Interpolation] = (PLM_ONLY,),
    temperature: float = 1.0,
    settings: DecodingSettings = DEFAULT_DECODING,
    reporter: Reporter | None = None,
) -> tuple[list[ScoredLabels], GenerationStats]:
    """Compute as much of the tree of labels as the mixtures need, for all texts.

    The server sees the prompts and prefixes of labels. With a tolerance, those show which labels seem probable; without
    one, all of them are sent behind each text.

    Args:
        plm: the PLM.
        requests: texts whose labels are scored.
        labels: the labels, in the order of the requests' ids.
        adapter: the data owner's adapter; None for the PLM alone.
        interpolations: mixtures for which the result is to be exact within the tolerance.
        temperature: temperature of the labels' distribution.
        settings: batch size and tolerance.
        reporter: shows the progress; None for none.

    Raises:
        InvalidData: the tokens of labels cannot be told apart.
        PemaError: a call to the PLM failed.
    """
    if all(each.finished(0, 1.0) for each in interpolations):
        adapter = None
    interpolations = interpolations if adapter else (PLM_ONLY,)
    groups = defaultdict[LabelIds, list[int]](list)
    for number, request in enumerate(requests):
        groups[request.label_ids].append(number)
    scored, stats = list[ScoredLabels](), GenerationStats()
    tolerance = LABEL_TOLERANCE if settings.label_tolerance is None else settings.label_tolerance
    with (reporter or Reporter()).bar("scoring labels", len(requests), "texts") as bar:
        for label_ids, numbers in groups.items():
            scorer = TreeScorer(plm, LabelTrie.from_ids(labels, label_ids), adapter, interpolations, stats)
            for start in range(0, len(numbers), settings.batch_size):
                batch = numbers[start : start + settings.batch_size]
                evidence = scorer.score([requests[n] for n in batch], tolerance, temperature)
                scored.append(ScoredLabels(batch, evidence))
                bar.advance(len(batch))
    return scored, stats

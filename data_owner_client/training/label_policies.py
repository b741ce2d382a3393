"""Choice of the decoding policy of a `classify` task, by the probabilities of labels of held-out texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter
from data_owner_client.scoring.scorer import scores_in_words
from data_owner_client.training.held_out_labels import CONSTANT_LAMBDAS, HeldOutLabels, label_settings
from data_owner_client.training.inputs import Memories
from data_owner_client.training.policies import DecodingPolicy, PromptVariant
from data_owner_client.training.policy_choice import bagged_maximum, clearly_better


def select_by_labels(
    plm: RemotePlm,
    memories: Memories,
    texts: int,
    adapter: TrainedAdapter,
    variant: PromptVariant,
    likeliest: Sequence[DecodingPolicy],
    reporter: Reporter,
) -> list[DecodingPolicy]:
    """Policies with the probabilities that they give to the right labels of held-out texts, the chosen one first.

    All are computed from the same representations. Each has the temperature that suits it best, so that they are
    compared by what they know and not by how sure they are. The constant λ is that of the highest mean log-probability
    (`bagged_maximum`). A likeliest policy whose λ is not constant must be clearly better.

    Args:
        plm: the PLM.
        memories: both memories.
        texts: held-out texts to score.
        adapter: the trained adapter, with the prompts of the variant.
        variant: held-out rows behind these prompts.
        likeliest: the likeliest policy of each schedule, and of the gate.
        reporter: shows what is tried.
    """
    task, pairs = memories.plan.task, memories.held_out_pairs[:texts]
    flexible = [each for each in likeliest if each.interpolation.gate or each.interpolation.schedule != "constant"]
    held_out = HeldOutLabels(
        plm,
        task,
        pairs,
        adapter,
        [policy.interpolation for policy in flexible],
        label_settings(memories.plan.context_mode),
        reporter,
    )
    tried: dict[Interpolation, DecodingPolicy] = {}
    utilities: dict[Interpolation, Tensor] = {}

    def fit(policy: DecodingPolicy) -> Tensor:
        if policy.interpolation not in tried:
            found = held_out.fit(policy.interpolation)
            scores = {
                "scores": memories.scorer.scores(found.answers),
                "label_nll": found.nll,
                "label_temperature": found.temperature,
            }
            tried[policy.interpolation] = policy.model_copy(update=scores)
            utilities[policy.interpolation] = found.utility_E
        return utilities[policy.interpolation]

    grid = [variant.policy(Interpolation(schedule="constant", lambda_max=value)) for value in CONSTANT_LAMBDAS]
    utility_P_E = torch.stack([fit(policy) for policy in grid])
    lambda_max = round(bagged_maximum(torch.tensor(CONSTANT_LAMBDAS, dtype=torch.float64), utility_P_E), 2)
    chosen = variant.policy(Interpolation(schedule="constant", lambda_max=lambda_max))
    utility_E = fit(chosen)
    for policy in [grid[0], chosen, *flexible]:
        other_E = fit(policy)
        found = tried[policy.interpolation]
        words = scores_in_words(memories.scorer.metrics, found.scores or {})
        reporter.say(f"{policy}: {words}, {found.label_nll:.3f} nats per label on {len(pairs)} validation texts.")
        if clearly_better(other_E, utility_E):
            chosen, utility_E = policy, other_E
    best = tried.pop(chosen.interpolation)
    return [best, *sorted(tried.values(), key=lambda policy: policy.label_nll or 0.0)]

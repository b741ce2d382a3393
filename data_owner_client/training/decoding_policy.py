"""Choice of prompts, interpolation and length reward for a trained adapter, on the held-out pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.data.example_retrieval import with_retrieved_examples
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.generation import translate
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.memory.encode import encode_all
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.memory.tokenized_pairs import tokenize_pairs
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter
from data_owner_client.scoring.scorer import Metric, scores_in_words
from data_owner_client.training.decoded_policies import DecodedPolicies, TextStore
from data_owner_client.training.inputs import Memories, TrainingInput
from data_owner_client.training.label_policies import select_by_labels
from data_owner_client.training.policies import DecodingPolicy, PromptVariant
from data_owner_client.training.policy_choice import clearly_better, supported_maximum
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.time_budget import TimeBudget, WorkPlan
from protocol.errors import InvalidData

# Retrieved examples in a prompt that are tried if the user names no number.
DEFAULT_RETRIEVED_EXAMPLES = 8
# Constant values of λ that are decoded, both ends among the first three.
_LAMBDAS = (0.45, 0.3, 0.8, 0.6)
# The same, where targets are likeliest with more than all of those.
_HIGH_LAMBDAS = (0.6, 0.3, 0.99, 0.85)
# Values that a parabola needs.
_PARABOLA_POINTS = 3
# Length rewards that are tried with the best λ.
_REWARDS = (0.5, 1.0)


def max_policies(task: Task) -> int:
    """The number of times that held-out texts are decoded, at most. The labels of a text are scored only once."""
    if task.kind == "classify":
        return 1
    return len(_LAMBDAS) + 2 + len(_REWARDS)


def select_decoding_policy(
    plm: RemotePlm,
    memories: Memories,
    inputs: TrainingInput,
    settings: TrainingSettings,
    with_policy: Callable[[DecodingPolicy], TrainedAdapter],
    reporter: Reporter,
    *,
    plan: WorkPlan,
    budget: TimeBudget,
    store: TextStore,
) -> list[DecodingPolicy]:
    """Return every policy that was tried, best first: by likelihood, or by the task's metric if texts are decoded.

    Likelihood scores each token after the true text, so its λ is not always the best for whole texts.

    Args:
        plm: the PLM.
        memories: both memories.
        inputs: inputs of the training.
        settings: settings that say which policies to try.
        with_policy: gives the trained adapter with a policy on its card.
        reporter: shows what is tried.
        plan: says which prompts are tried.
        budget: time for everything.
        store: texts that an interrupted call decoded.

    Raises:
        InvalidData: prompts with retrieved examples change the tokens of the targets.
        PemaError: a call to the PLM failed.
    """
    plain = with_policy(DecodingPolicy(nearest=0, interpolation=Interpolation(), nll=0.0))
    variants: dict[int, PromptVariant] = {}
    if not settings.retrieved_examples:
        variants[0] = PromptVariant.from_rows(0, inputs.validation, plain, inputs.held_out)
    if plan.retrieval:
        count = settings.retrieved_examples or DEFAULT_RETRIEVED_EXAMPLES
        rows = _encode_with_retrieved_examples(plm, memories, count, reporter)
        logprob_N = inputs.targets.plm_logprobs(rows)
        if rows.reliable_N is not None:
            logprob_N = logprob_N[rows.reliable_N.bool()]
        data = replace(inputs.validation, plm_logprob_N=logprob_N)
        variants[count] = PromptVariant.from_rows(count, data, plain, rows)
    policies = [policy for variant in variants.values() for policy in variant.likeliest(gate=settings.gate)]
    policies.sort(key=lambda policy: policy.nll)
    likeliest = policies[0]
    texts = plan.wishes.fitting_texts(budget.left, plan.costs, retrieval=likeliest.nearest > 0)
    if not texts:
        return policies
    if memories.plan.task.kind == "classify":
        variant = variants[likeliest.nearest]
        rivals = [policy for policy in policies if policy.nearest == likeliest.nearest]
        return [*select_by_labels(plm, memories, texts, with_policy(likeliest), variant, rivals, reporter), *policies]
    trials = _Trials.of(plm, memories, texts, with_policy(likeliest), budget, store, reporter)
    return [*_by_answers(likeliest, variants[likeliest.nearest], trials), *policies]


@dataclass
class _Trials:
    """Policies that are tried on held-out texts, and what is said about them."""

    decoded: DecodedPolicies
    metrics: Mapping[str, Metric]
    reporter: Reporter
    policies: dict[Interpolation, DecodingPolicy] = field(default_factory=dict)
    scores_E: dict[Interpolation, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        plm: RemotePlm,
        memories: Memories,
        texts: int,
        adapter: TrainedAdapter,
        budget: TimeBudget,
        store: TextStore,
        reporter: Reporter,
    ) -> _Trials:
        task, pairs = memories.plan.task, memories.held_out_pairs[:texts]
        # Twice the longest target: a longer text is wrong in any case.
        decoding = DecodingSettings(max_new_tokens=2 * int(memories.held_out.rows_E.max()))

        def decode(interpolation: Interpolation, count: int) -> list[str]:
            sources = [pair.question for pair in pairs[:count]]
            return translate(
                plm, sources, adapter=adapter, interpolation=interpolation, decoding=decoding, reporter=reporter
            ).texts

        policies = max_policies(task)
        decoded = DecodedPolicies(decode, memories.scorer, len(pairs), policies=policies, budget=budget, store=store)
        return cls(decoded, memories.scorer.metrics, reporter)

    def add(self, policy: DecodingPolicy) -> bool:
        """Decode the texts with a policy; return False if there is no time for it."""
        if policy.interpolation in self.policies:
            return True
        scored = self.decoded.score(policy.interpolation)
        if scored is None:
            return False
        self.policies[policy.interpolation] = policy.model_copy(update={"scores": scored.scores})
        self.scores_E[policy.interpolation] = scored.score_E
        words = scores_in_words(self.metrics, scored.scores)
        self.reporter.say(f"{policy}: {words} on {self.decoded.texts} validation texts.")
        return True

    def score_E(self, policy: DecodingPolicy) -> Tensor:
        """The headline metric of each text; the policy must have been added."""
        return self.scores_E[policy.interpolation]

    def better(self, other: DecodingPolicy, chosen: DecodingPolicy) -> DecodingPolicy:
        """The other policy if it is clearly better, else the chosen one, as without time for the other."""
        if self.add(other) and clearly_better(self.score_E(other), self.score_E(chosen)):
            return other
        return chosen


def _by_answers(likeliest: DecodingPolicy, variant: PromptVariant, trials: _Trials) -> list[DecodingPolicy]:
    """Policies with their scores on held-out texts, the chosen one first.

    They are compared by the task's headline metric, which each text has. Corpus BLEU is not used: on few texts it
    depends on one or two of them. Neither is the highest mean as such, as its noise is larger than most differences:

    1. The constant λ is between the maximum of a parabola through a few of them and the likeliest one, nearer to the
       one that is surer (`supported_maximum`).
    2. The likeliest policy, if its λ is not constant, must be clearly better than that.
    3. So must a length reward be: chrF weighs recall twice as much as precision, so it hardly sees the superfluous
       words that a reward brings.
    """
    likeliest_constant, _ = variant.data.best(variant.pema_logprob_N, "constant")
    lambdas = _HIGH_LAMBDAS if likeliest_constant.lambda_max > max(_LAMBDAS) else _LAMBDAS
    grid = [variant.policy(Interpolation(schedule="constant", lambda_max=value)) for value in lambdas]
    grid = [policy for policy in grid if trials.add(policy)]
    chosen = likeliest
    if len(grid) >= _PARABOLA_POINTS:
        lambda_P = torch.tensor([policy.interpolation.lambda_max for policy in grid], dtype=torch.float64)
        score_P_E = torch.stack([trials.score_E(policy) for policy in grid])
        lambda_max = round(supported_maximum(lambda_P, score_P_E, likeliest=likeliest_constant.lambda_max), 2)
        chosen = variant.policy(Interpolation(schedule="constant", lambda_max=lambda_max))
        if trials.add(chosen):
            if likeliest.interpolation.gate is not None or likeliest.interpolation.schedule != "constant":
                chosen = trials.better(likeliest, chosen)
            plain = chosen
            for reward in _REWARDS:
                chosen = trials.better(plain.with_length_reward(reward), chosen)
    if trials.decoded.refused:
        trials.reporter.say(
            f"Left out for lack of time: {trials.decoded.refused} decoding policies (included with --minutes "
            f"{trials.decoded.minutes_for_all})."
        )
    chosen = trials.policies.get(chosen.interpolation, chosen)
    others = [policy for policy in trials.policies.values() if policy.interpolation != chosen.interpolation]
    others.sort(key=lambda policy: -trials.score_E(policy).mean().item())
    return [chosen, *others]


def _encode_with_retrieved_examples(plm: RemotePlm, memories: Memories, count: int, reporter: Reporter) -> MemoryRows:
    """Rows of the held-out pairs behind prompts with `count` retrieved examples each."""
    pairs, shown = memories.held_out_pairs, memories.validation.shown_pairs()
    sources = [pair.question for pair in memories.shown_held_out_pairs]
    tasks = with_retrieved_examples(plm, memories.plan.task, sources, memories.retriever(count))
    tokenized = tokenize_pairs(plm, tasks, pairs, shown, label="validation pair")
    rows = encode_all(plm, tokenized, reporter).only_reliable_match()
    if not _are_of_same_targets(rows, memories.held_out):
        raise InvalidData(
            "The targets become other tokens behind prompts with retrieved examples.",
            hint="Use --retrieved-examples 0.",
        )
    return rows


def _are_of_same_targets(rows: MemoryRows, others: MemoryRows) -> bool:
    """True if rows have the same targets, with reliable contexts at the same places."""
    same = torch.equal(rows.target_N, others.target_N)
    if rows.reliable_N is None or others.reliable_N is None:
        return same
    return same and torch.equal(rows.reliable_N, others.reliable_N)

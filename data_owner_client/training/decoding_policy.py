"""Choice of prompts, interpolation and length reward for a trained adapter, on the held-out pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from pydantic import BaseModel
from torch import Tensor

from data_owner_client.adapter.gate import Gate, cross_validated_nll
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.data.example_retrieval import ExampleRetriever, with_retrieved_examples
from data_owner_client.decoding.generation import translate
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.memory.encode import encode_all, tokenize_pairs
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter
from data_owner_client.training.decoded_policies import DecodedPolicies, TextStore
from data_owner_client.training.inputs import Memories, TrainingInput
from data_owner_client.training.likelihood import pema_logprobs_and_gate_features
from data_owner_client.training.policy_choice import clearly_better, smoothed_maximum
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.time_budget import TimeBudget, WorkPlan
from data_owner_client.training.validation import ValidationData, likeliest_interpolations
from protocol.errors import InvalidData

# Retrieved examples in a prompt that are tried if the user names no number.
DEFAULT_RETRIEVED_EXAMPLES = 8
# Constant values of λ that are decoded, both ends among the first three.
_LAMBDAS = (0.45, 0.3, 0.8, 0.6)
# Values that a parabola needs.
_PARABOLA_POINTS = 3
# Length rewards that are tried with the best λ.
_REWARDS = (0.5, 1.0)
MAX_POLICIES = len(_LAMBDAS) + 2 + len(_REWARDS)
"""Decoding policies that held-out texts are decoded with, at most."""


class DecodingPolicy(BaseModel):
    """Prompts and interpolation to use an adapter with, and their scores on the held-out pairs.

    Attributes:
        nearest: retrieved examples in each prompt of the PLM; 0 for the examples of the task.
        interpolation: interpolation with the PLM.
        nll: loss of the mixture, in nats per token. A length reward only affects decoding and does not change it.
        bleu: BLEU of decoded texts, with the tokenizer of `bleu_tokenizer`; None if this policy was not decoded.
        chrf: chrF of decoded texts; None if this policy was not decoded.
    """

    nearest: int
    interpolation: Interpolation
    nll: float
    bleu: float | None = None
    chrf: float | None = None

    def __str__(self) -> str:
        """The policy in words."""
        prompts = f", prompts with {self.nearest} retrieved examples" if self.nearest else ""
        return f"{self.interpolation}{prompts}"

    def with_length_reward(self, length_reward: float) -> DecodingPolicy:
        """A copy with another length reward."""
        return self.model_copy(update={"interpolation": self.interpolation.with_length_reward(length_reward)})


@dataclass(frozen=True)
class PromptVariant:
    """Held-out rows behind one kind of prompt for the PLM.

    Attributes:
        nearest: retrieved examples in each prompt of the PLM; 0 for the examples of the task.
        data: held-out rows with the PLM's likelihood behind these prompts.
        pema_logprob_N: log P_PEMA(y) of each row, float64.
        features_N_F: inputs of a gate for each row.
    """

    nearest: int
    data: ValidationData
    pema_logprob_N: Tensor
    features_N_F: Tensor

    @classmethod
    def from_rows(
        cls, nearest: int, data: ValidationData, adapter: TrainedAdapter, plm_rows: MemoryRows
    ) -> PromptVariant:
        """Compute the adapter's side; `plm_rows` are the rows behind these prompts, with log-sum-exp."""
        return cls(nearest, data, *pema_logprobs_and_gate_features(adapter, data, plm_rows))

    def policy(self, interpolation: Interpolation) -> DecodingPolicy:
        """The policy with an interpolation that has no gate, and its loss."""
        nll = self.data.mixture_nll(self.pema_logprob_N, interpolation)
        return DecodingPolicy(nearest=self.nearest, interpolation=interpolation, nll=nll)

    def likeliest(self, *, gate: bool) -> list[DecodingPolicy]:
        """The policies with the likeliest λ_max of each schedule and, if `gate` is set, with a fitted gate."""
        policies = [self.policy(each) for each in likeliest_interpolations(self.data, self.pema_logprob_N)]
        if gate:
            sides = self.features_N_F, self.data.plm_logprob_N, self.pema_logprob_N
            nll, mean_lambda = cross_validated_nll(*sides, self.data.position_N)
            gated = Interpolation(schedule="constant", lambda_max=mean_lambda, gate=Gate.fit(*sides))
            policies.append(DecodingPolicy(nearest=self.nearest, interpolation=gated, nll=nll))
        return policies


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
    """Return every policy that was tried, best first: by likelihood, or by chrF if held-out texts are decoded.

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
        data = replace(inputs.validation, plm_logprob_N=inputs.targets.plm_logprobs(rows))
        variants[count] = PromptVariant.from_rows(count, data, plain, rows)
    policies = [policy for variant in variants.values() for policy in variant.likeliest(gate=settings.gate)]
    policies.sort(key=lambda policy: policy.nll)
    likeliest = policies[0]
    wishes = plan.wishes.of_decoding(retrieval=likeliest.nearest > 0)
    plan = WorkPlan.within(budget.left, wishes, replace(plan.costs, retrieval=0.0))
    if not plan.texts:
        return policies
    trials = _Trials.of(plm, memories, plan.texts, with_policy(likeliest), budget, store, reporter)
    return [*_by_chrf(likeliest, variants[likeliest.nearest], trials), *policies]


@dataclass
class _Trials:
    """Policies that are tried on held-out texts, and what is said about them."""

    decoded: DecodedPolicies
    policies: dict[Interpolation, DecodingPolicy]
    reporter: Reporter

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
        pairs = memories.held_out_pairs[:texts]
        # Twice the longest target: a longer text is wrong in any case.
        decoding = DecodingSettings(max_new_tokens=2 * int(memories.held_out.rows_E.max()))

        def decode(interpolation: Interpolation, count: int) -> list[str]:
            sources = [pair.source for pair in pairs[:count]]
            return translate(
                plm, sources, adapter=adapter, interpolation=interpolation, decoding=decoding, reporter=reporter
            ).texts

        references = [pair.target or "" for pair in pairs]
        decoded = DecodedPolicies(decode, references, policies=MAX_POLICIES, budget=budget, store=store)
        return cls(decoded, {}, reporter)

    def add(self, policy: DecodingPolicy) -> bool:
        """Decode the texts with a policy; return False if there is no time for it."""
        interpolation = policy.interpolation
        if interpolation in self.policies:
            return True
        if not self.decoded.add(interpolation):
            return False
        scores = self.decoded.scores(interpolation)
        self.policies[interpolation] = policy
        self.reporter.say(
            f"{policy}: BLEU {scores.bleu:.1f}, chrF {scores.chrf:.1f} on {self.decoded.texts} validation texts."
        )
        return True

    def score_E(self, policy: DecodingPolicy) -> Tensor:
        """Sentence-level chrF of each text."""
        return self.decoded.chrf_E(policy.interpolation)

    def better(self, other: DecodingPolicy, chosen: DecodingPolicy) -> DecodingPolicy:
        """The other policy if it is clearly better, else the chosen one, as without time for the other."""
        if self.add(other) and clearly_better(self.score_E(other), self.score_E(chosen)):
            return other
        return chosen

    def scored(self, policy: DecodingPolicy) -> DecodingPolicy:
        """The policy with its corpus scores."""
        scores = self.decoded.scores(policy.interpolation)
        return policy.model_copy(update={"bleu": scores.bleu, "chrf": scores.chrf})


def _by_chrf(likeliest: DecodingPolicy, variant: PromptVariant, trials: _Trials) -> list[DecodingPolicy]:
    """Policies with their scores on held-out texts, the chosen one first.

    BLEU is not used: on few texts it depends on one or two of them. Neither is the highest chrF as such, as its noise
    is larger than most differences:

    1. The constant λ is that of the maximum of a parabola through a few of them (`smoothed_maximum`).
    2. The likeliest policy, if its λ is not constant, must be clearly better than that.
    3. So must a length reward be: chrF weighs recall twice as much as precision, so it hardly sees the superfluous
       words that a reward brings.
    """
    grid = [variant.policy(Interpolation(schedule="constant", lambda_max=value)) for value in _LAMBDAS]
    grid = [policy for policy in grid if trials.add(policy)]
    chosen = likeliest
    if len(grid) >= _PARABOLA_POINTS:
        lambda_P = torch.tensor([policy.interpolation.lambda_max for policy in grid], dtype=torch.float64)
        score_P_E = torch.stack([trials.score_E(policy) for policy in grid])
        lambda_max = round(smoothed_maximum(lambda_P, score_P_E), 2)
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
    others = sorted(map(trials.scored, trials.policies.values()), key=lambda policy: -(policy.chrf or 0.0))
    if chosen.interpolation in trials.policies:
        chosen = trials.scored(chosen)
    return [chosen, *(each for each in others if each.interpolation != chosen.interpolation)]


def _encode_with_retrieved_examples(plm: RemotePlm, memories: Memories, count: int, reporter: Reporter) -> MemoryRows:
    """Rows of the held-out pairs behind prompts with `count` retrieved examples each."""
    pairs, retriever = memories.held_out_pairs, ExampleRetriever(memories.train_pairs, count)
    tasks = with_retrieved_examples(plm, memories.plan.task, [pair.source for pair in pairs], retriever)
    rows = encode_all(plm, tokenize_pairs(plm, tasks, pairs, label="validation pair"), reporter)
    if not torch.equal(rows.target_N, memories.held_out.target_N):
        raise InvalidData(
            "The targets become other tokens behind prompts with retrieved examples.",
            hint="Use --retrieved-examples 0.",
        )
    return rows

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
from data_owner_client.data.text_metrics import sentence_chrf, text_scores
from data_owner_client.decoding.generation import translate
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.memory.encode import encode_all, tokenize_pairs
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter
from data_owner_client.training.inputs import Memories, TrainingInput
from data_owner_client.training.likelihood import pema_logprobs_and_gate_features
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.validation import ValidationData, likeliest_interpolations
from protocol.errors import InvalidData

# Retrieved examples in a prompt that are tried if the user names no number.
DEFAULT_RETRIEVED_EXAMPLES = 8
# Values of λ_max that are decoded besides the likeliest interpolation, with the first reward; then the best with all.
_LAMBDAS = (0.3, 0.5, 0.7, 0.85)
_REWARDS = (1.0, 0.0, 0.5, 2.0)
_ROUNDING = 1e-6


class DecodingPolicy(BaseModel):
    """Prompts and interpolation to use an adapter with, and their scores on the held-out pairs.

    Attributes:
        nearest: retrieved examples in each prompt of the PLM; 0 for the examples of the task.
        interpolation: interpolation with the PLM.
        nll: loss of the mixture, in nats per token. A length reward only affects decoding and does not change it.
        bleu: BLEU of decoded texts; None if this policy was not decoded.
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

    Raises:
        InvalidData: prompts with retrieved examples change the tokens of the targets.
        PemaError: a call to the PLM failed.
    """
    plain = with_policy(DecodingPolicy(nearest=0, interpolation=Interpolation(), nll=0.0))
    variants: dict[int, PromptVariant] = {}
    if not settings.retrieved_examples:
        variants[0] = PromptVariant.from_rows(0, inputs.validation, plain, inputs.held_out)
    if settings.retrieved_examples != 0 and memories.plan.context_mode == "teacher-forced":
        count = settings.retrieved_examples or DEFAULT_RETRIEVED_EXAMPLES
        rows = _encode_with_retrieved_examples(plm, memories, count, reporter)
        data = replace(inputs.validation, plm_logprob_N=inputs.targets.plm_logprobs(rows))
        variants[count] = PromptVariant.from_rows(count, data, plain, rows)
    policies = [policy for variant in variants.values() for policy in variant.likeliest(gate=settings.gate)]
    policies.sort(key=lambda policy: policy.nll)
    if not settings.selection_texts:
        return policies
    best = policies[0]
    decoded = _rank_by_chrf(
        plm, memories, settings.selection_texts, best, variants[best.nearest], with_policy, reporter
    )
    return [*decoded, *policies]


def _rank_by_chrf(
    plm: RemotePlm,
    memories: Memories,
    max_texts: int,
    likeliest: DecodingPolicy,
    variant: PromptVariant,
    with_policy: Callable[[DecodingPolicy], TrainedAdapter],
    reporter: Reporter,
) -> list[DecodingPolicy]:
    """Policies with their scores on held-out texts, the chosen one first: λ is chosen, then the length reward, then λ.

    BLEU is not used: on few texts it depends on the one or two that do not end. A length reward must be clearly better:
    chrF weighs recall twice as much as precision, so it hardly sees the superfluous words that a reward brings.
    """
    pairs, adapter = memories.held_out_pairs[:max_texts], with_policy(likeliest)
    sources, references = [pair.source for pair in pairs], [pair.target or "" for pair in pairs]
    # Twice the longest target: a longer text is wrong in any case.
    decoding = DecodingSettings(max_new_tokens=2 * int(memories.held_out.rows_E.max()))
    scored: dict[Interpolation, DecodingPolicy] = {}
    chrf_E: dict[Interpolation, Tensor] = {}

    def decode(policy: DecodingPolicy) -> None:
        interpolation = policy.interpolation
        if interpolation in scored:
            return
        texts = translate(
            plm, sources, adapter=adapter, interpolation=interpolation, decoding=decoding, reporter=reporter
        ).texts
        scores = text_scores(texts, references)
        reporter.say(f"{policy}: BLEU {scores.bleu:.1f}, chrF {scores.chrf:.1f} on {len(pairs)} validation texts.")
        scored[interpolation] = policy.model_copy(update={"bleu": scores.bleu, "chrf": scores.chrf})
        chrf_E[interpolation] = sentence_chrf(texts, references)

    def best(reward: float | None = None) -> DecodingPolicy:
        policies = [each for each in scored.values() if reward in (None, each.interpolation.length_reward)]
        return max(policies, key=lambda policy: policy.chrf or 0.0)

    def constant(lambda_max: float) -> DecodingPolicy:
        return variant.policy(Interpolation(schedule="constant", lambda_max=lambda_max))

    for policy in [likeliest, *map(constant, _LAMBDAS)]:
        decode(policy.with_length_reward(_REWARDS[0]))
    plain = best().with_length_reward(0.0)
    for reward in _REWARDS:
        decode(plain.with_length_reward(reward))
    chosen = best()
    if not clearly_better(chrf_E[chosen.interpolation], chrf_E[plain.interpolation]):
        chosen = plain
    interpolation = chosen.interpolation
    if interpolation.gate is None and interpolation.schedule == "constant":
        for step in (-0.1, 0.1):
            lambda_max = min(1.0, max(0.0, round(interpolation.lambda_max + step, 3)))
            decode(constant(lambda_max).with_length_reward(interpolation.length_reward))
    chosen = best(interpolation.length_reward)
    return [chosen, *sorted((each for each in scored.values() if each != chosen), key=lambda each: -(each.chrf or 0.0))]


def clearly_better(score_E: Tensor, other_E: Tensor) -> bool:
    """Return True if the mean score of the same texts is higher by more than the standard error of the difference.

    The rule of one standard error prefers the simpler of two nearly equal choices (Breiman et al. 1984, section 3.4.3).
    """
    difference_E = score_E - other_E
    error = difference_E.std(correction=0) / max(1, len(difference_E) - 1) ** 0.5
    # If a single text differs, the mean equals the error, and rounding must not decide which of them is larger.
    return bool(difference_E.mean() > (1 + _ROUNDING) * error)


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

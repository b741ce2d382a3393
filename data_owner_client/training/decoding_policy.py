"""How a trained adapter is used: prompts, interpolation and length reward, chosen on the held-out pairs."""

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
from data_owner_client.decoding.speculative import DecodingSettings
from data_owner_client.memory.encode import encode_all, tokenize_pairs
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter
from data_owner_client.training.inputs import Memories, TrainingInput
from data_owner_client.training.likelihood import both_sides
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.validation import ValidationData, likeliest_interpolations
from protocol.errors import InvalidData

# Examples of its own for every prompt, where the user does not say how many.
NEAREST = 8
# What is decoded besides the likeliest interpolation; each with the first of the rewards, the best with all of them.
_LAMBDAS = (0.3, 0.5, 0.7, 0.85)
_REWARDS = (1.0, 0.0, 0.5, 2.0)
_ROUNDING = 1e-6


class DecodingPolicy(BaseModel):
    """A way to use the adapter, as it did on the held-out pairs.

    Attributes:
        nearest: examples that each prompt of the PLM has for itself; 0 for those of the task.
        interpolation: with the PLM.
        nll: of the mixture, in nats per token; a length reward, which is for choices alone, does not change it.
        bleu: of decoded texts, where this option was decoded.
        chrf: likewise.
    """

    nearest: int
    interpolation: Interpolation
    nll: float
    bleu: float | None = None
    chrf: float | None = None

    def __str__(self) -> str:
        """In words."""
        prompts = f", prompts with {self.nearest} examples of their own" if self.nearest else ""
        return f"{self.interpolation}{prompts}"

    def with_length_reward(self, length_reward: float) -> DecodingPolicy:
        """The same with another length reward."""
        return self.model_copy(update={"interpolation": self.interpolation.with_length_reward(length_reward)})


@dataclass(frozen=True)
class PromptVariant:
    """Held-out rows with one kind of prompt for the PLM, as both sides see them.

    Attributes:
        nearest: see `DecodingPolicy`.
        data: with the PLM's likelihood behind these prompts.
        pema_logprob_N: log P_PEMA(y), float64.
        features_N_F: of a gate.
    """

    nearest: int
    data: ValidationData
    pema_logprob_N: Tensor
    features_N_F: Tensor

    @classmethod
    def of(cls, nearest: int, data: ValidationData, adapter: TrainedAdapter, plm_rows: MemoryRows) -> PromptVariant:
        """Of the rows that the PLM's distributions come from."""
        return cls(nearest, data, *both_sides(adapter, data, plm_rows))

    def option(self, interpolation: Interpolation) -> DecodingPolicy:
        """How likely a mixture without a gate finds the targets."""
        nll = self.data.mixture_nll(self.pema_logprob_N, interpolation)
        return DecodingPolicy(nearest=self.nearest, interpolation=interpolation, nll=nll)

    def likeliest(self, *, gate: bool) -> list[DecodingPolicy]:
        """Every schedule with its likeliest λ_max; and a gate, if wanted."""
        found = [self.option(each) for each in likeliest_interpolations(self.data, self.pema_logprob_N)]
        if gate:
            sides = self.features_N_F, self.data.plm_logprob_N, self.pema_logprob_N
            nll, mean_lambda = cross_validated_nll(*sides, self.data.position_N)
            gated = Interpolation(schedule="constant", lambda_max=mean_lambda, gate=Gate.fit(*sides))
            found.append(DecodingPolicy(nearest=self.nearest, interpolation=gated, nll=nll))
        return found


def select_decoding_policy(
    plm: RemotePlm,
    memories: Memories,
    given: TrainingInput,
    settings: TrainingSettings,
    with_option: Callable[[DecodingPolicy], TrainedAdapter],
    reporter: Reporter,
) -> list[DecodingPolicy]:
    """All that was tried, what to use first: the likeliest, or, where texts are decoded, what `_rank_by_chrf` says.

    Likelihood takes the texts before each token as given, so its λ is not always the best for whole texts.

    Args:
        plm: the server.
        memories: both.
        given: what was trained on.
        settings: which of the choices are open.
        with_option: the trained adapter, as it is used with an option.
        reporter: told of what is tried.
    """
    plain = with_option(DecodingPolicy(nearest=0, interpolation=Interpolation(), nll=0.0))
    promptings: dict[int, PromptVariant] = {}
    if not settings.nearest:
        promptings[0] = PromptVariant.of(0, given.validation, plain, given.held_out)
    if settings.nearest != 0 and memories.plan.context_mode == "teacher-forced":
        count = settings.nearest or NEAREST
        rows = _encode_with_nearest(plm, memories, count, reporter)
        near = replace(given.validation, plm_logprob_N=given.targets.plm_logprobs(rows))
        promptings[count] = PromptVariant.of(count, near, plain, rows)
    found = [option for each in promptings.values() for option in each.likeliest(gate=settings.gate)]
    found.sort(key=lambda option: option.nll)
    if not settings.decoded:
        return found
    best = found[0]
    decoded = _rank_by_chrf(plm, memories, settings.decoded, best, promptings[best.nearest], with_option, reporter)
    return [*decoded, *found]


def _rank_by_chrf(
    plm: RemotePlm,
    memories: Memories,
    most_texts: int,
    likeliest: DecodingPolicy,
    prompting: PromptVariant,
    with_option: Callable[[DecodingPolicy], TrainedAdapter],
    reporter: Reporter,
) -> list[DecodingPolicy]:
    """Options with their scores on held-out texts, the chosen one first: λ is chosen, the length reward, λ again.

    Not by BLEU: of so few texts it is that of the one or two that do not come to an end, if there are any. And a length
    reward must be worth it: chrF counts what is there of the reference twice as much as what is there besides, so it
    hardly sees the superfluous words that a reward brings, too.
    """
    pairs, adapter = memories.held_out_pairs[:most_texts], with_option(likeliest)
    sources, references = [pair.source for pair in pairs], [pair.target or "" for pair in pairs]
    # Twice the longest target: who goes on after that is wrong in any case.
    decoding = DecodingSettings(max_new_tokens=2 * int(memories.held_out.rows_E.max()))
    scored: dict[Interpolation, DecodingPolicy] = {}
    chrf_E: dict[Interpolation, Tensor] = {}

    def decode(option: DecodingPolicy) -> None:
        interpolation = option.interpolation
        if interpolation in scored:
            return
        texts = translate(
            plm, sources, adapter=adapter, interpolation=interpolation, decoding=decoding, reporter=reporter
        ).texts
        scores = text_scores(texts, references)
        reporter.say(f"{option}: BLEU {scores.bleu:.1f}, chrF {scores.chrf:.1f} on {len(pairs)} validation texts.")
        scored[interpolation] = option.model_copy(update={"bleu": scores.bleu, "chrf": scores.chrf})
        chrf_E[interpolation] = sentence_chrf(texts, references)

    def best(reward: float | None = None) -> DecodingPolicy:
        given = [each for each in scored.values() if reward in (None, each.interpolation.length_reward)]
        return max(given, key=lambda option: option.chrf or 0.0)

    def constant(lambda_max: float) -> DecodingPolicy:
        return prompting.option(Interpolation(schedule="constant", lambda_max=lambda_max))

    for option in [likeliest, *map(constant, _LAMBDAS)]:
        decode(option.with_length_reward(_REWARDS[0]))
    plain = best().with_length_reward(0.0)
    for reward in _REWARDS:
        decode(plain.with_length_reward(reward))
    chosen = best()
    if not clearly_better(chrf_E[chosen.interpolation], chrf_E[plain.interpolation]):
        chosen = plain
    used = chosen.interpolation
    if used.gate is None and used.schedule == "constant":
        for step in (-0.1, 0.1):
            decode(constant(min(1.0, max(0.0, round(used.lambda_max + step, 3)))).with_length_reward(used.length_reward))
    chosen = best(used.length_reward)
    return [chosen, *sorted((each for each in scored.values() if each != chosen), key=lambda each: -(each.chrf or 0.0))]


def clearly_better(score_E: Tensor, other_E: Tensor) -> bool:
    """Whether the scores of the same texts are higher, on average, by more than the standard error of the difference.

    The rule of one standard error: of what is nearly as good, the simpler (Breiman et al. 1984, section 3.4.3).
    """
    difference_E = score_E - other_E
    error = difference_E.std(correction=0) / max(1, len(difference_E) - 1) ** 0.5
    # Where a single text differs, the mean is the error, and rounding must not say which of them is larger.
    return bool(difference_E.mean() > (1 + _ROUNDING) * error)


def _encode_with_nearest(plm: RemotePlm, memories: Memories, count: int, reporter: Reporter) -> MemoryRows:
    """The held-out pairs behind prompts with examples of their own."""
    pairs, nearest = memories.held_out_pairs, ExampleRetriever(memories.train_pairs, count)
    tasks = with_retrieved_examples(plm, memories.plan.task, [pair.source for pair in pairs], nearest)
    rows = encode_all(plm, tokenize_pairs(plm, tasks, pairs, label="validation pair"), reporter)
    if not torch.equal(rows.target_N, memories.held_out.target_N):
        raise InvalidData(
            "The targets are other tokens behind prompts with examples of their own.", hint="Use --nearest 0."
        )
    return rows

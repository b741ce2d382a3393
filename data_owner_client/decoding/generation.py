"""From texts to texts: prompts made and tokenised, continuations chosen and read."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, Unpack

from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.data.example_retrieval import with_retrieved_examples
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.client_drafts import NgramDrafter
from data_owner_client.decoding.decode_loop import Continuation, require_room
from data_owner_client.decoding.decode_loop import generate as generate_ids
from data_owner_client.decoding.mbr import rank_by_expected_chrf
from data_owner_client.decoding.sampling import Sampling
from data_owner_client.decoding.speculative import DEFAULT_DECODING, DecodingSettings, GenerationStats
from data_owner_client.decoding.token_selection import TokenChoice
from data_owner_client.memory.store import TRAIN, ExternalMemory
from data_owner_client.plm.identity import ModelIdentity
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.plm.tokenizer import Prompt
from data_owner_client.runtime.progress import Reporter
from protocol.errors import InvalidData, PemaError

CONSENSUS_TEMPERATURE = 0.6
"""Of a consensus's draws: sharper than the mixture, so that few texts go as far as many."""

OnFailure = Callable[[int, PemaError], None]
"""Told of a text, by its number from 0, and why it cannot be answered."""
OnToken = Callable[[int, int], None]
"""Told of a token: the number of its text from 0, and its id."""


@dataclass(frozen=True)
class Generation:
    """What was generated, in the order of the inputs, and what it took.

    Attributes:
        best: for each input all texts that were asked for, the most probable one first, or, by consensus, that which is
            most like all.
        choices: how each token of the first of them was chosen.
    """

    best: list[list[str]]
    choices: list[list[TokenChoice]]
    usage: GenerationStats
    seconds: float

    @property
    def texts(self) -> list[str]:
        """One for each input, the best if several were drawn."""
        return [own[0] for own in self.best]

    @property
    def token_ids(self) -> list[list[int]]:
        """Of these texts."""
        return [[choice.token for choice in own] for own in self.choices]


class GenerationOptions(TypedDict, total=False):
    """How to generate; each may be left away.

    Attributes:
        interpolation: what training chose unless given.
        decoding: length, look-ahead, batch size.
        lookup: where drafts are looked up (`ngram_drafter_for`); the owner of the PLM sees them.
        sampling: how to draw tokens; None for the most probable ones. The text depends on the seed, not on drafts.
        samples: texts to draw for each input.
        best: of these, how many of the most probable ones to give.
        consensus: draw so many texts for each input beside that of the most probable tokens, and order all by their
            likeness to one another (`decoding.consensus`). In the place of `samples`; without `sampling` at
            `CONSENSUS_TEMPERATURE`. With an adapter only known tokens are drawn, which needs no whole LM head.
        on_failure: told of each text (by its number, from 0) that cannot be answered; its result is then empty. Without
            it, such a text is an error of the whole.
        on_token: told of every token as soon as it is certain: the number of its text, and its id.
        reporter: told of the progress.
    """

    interpolation: Interpolation | None
    decoding: DecodingSettings
    lookup: NgramDrafter | None
    sampling: Sampling | None
    samples: int
    best: int
    consensus: int
    on_failure: OnFailure | None
    on_token: OnToken | None
    reporter: Reporter | None


def translate(
    plm: RemotePlm,
    sources: Sequence[str],
    *,
    adapter: CandidateDistribution | None = None,
    task: Task | None = None,
    **options: Unpack[GenerationOptions],
) -> Generation:
    """Answer source texts with a task's prompt.

    Args:
        plm: the PLM.
        sources: texts.
        adapter: the data owner's adapter; None for the PLM alone.
        task: the adapter's own unless given.
        options: see `GenerationOptions`.

    Raises:
        InvalidData: neither adapter nor task is given, or a text is too long.
        IdentityMismatch: the adapter belongs to another model.
    """
    task = task or (adapter.card.task if adapter else None)
    if task is None:
        raise InvalidData("Without an adapter there is no task.", hint="Give one with --task.")
    tokenizer = plm.tokenizer
    prompts = [task.prompt(source, tokenizer) for source in sources]
    own_prompts = None
    if adapter and adapter.nearest:
        tasks = with_retrieved_examples(plm, task, sources, adapter.nearest)
        own_prompts = prompts
        prompts = [each.prompt(source, tokenizer) for each, source in zip(tasks, sources, strict=True)]
    return _generate(
        plm,
        prompts,
        task,
        adapter=adapter,
        horizons=[adapter.card.horizon(tokenizer.count(source)) for source in sources] if adapter else None,
        own_prompts=own_prompts,
        **options,
    )


def generate(
    plm: RemotePlm,
    prompts: Sequence[str],
    *,
    adapter: CandidateDistribution | None = None,
    task: Task | None = None,
    **options: Unpack[GenerationOptions],
) -> Generation:
    """Continue prompts as they are, without a task's template around them.

    A bare prompt has no source text to predict a length from: Gradual Unrolling then uses the mean target length of the
    memory. The other arguments, and what is raised: see `translate`. The task only says where an answer
    stops.
    """
    return _generate(
        plm,
        [Prompt(prompt) for prompt in prompts],
        task or (adapter.card.task if adapter else Task(name="bare")),
        adapter=adapter,
        horizons=[adapter.card.mean_length] * len(prompts) if adapter else None,
        **options,
    )


def ngram_drafter_for(memory: Path) -> NgramDrafter:
    """Where drafts are looked up: the targets of a memory.

    The owner of the PLM sees the drafts, so it must have seen the targets before.

    Raises:
        InvalidData: the memory's targets were not shared, or it is missing or damaged.
    """
    part = ExternalMemory(memory / TRAIN)
    if part.manifest.plan.context_mode != "teacher-forced":
        raise InvalidData(
            f"The targets of {memory} were never shown to the PLM's owner, and drafts would be pieces of them.",
            hint="Leave --lookup away, or use a memory that was built with --share-targets.",
        )
    # Shard by shard: the representations, which are nearly all of a memory, are not needed.
    return NgramDrafter(ids_T.tolist() for rows in part.shards() for ids_T in rows.target_N.split(rows.rows_E.tolist()))


def _generate(
    plm: RemotePlm,
    prompts: Sequence[Prompt],
    task: Task,
    *,
    adapter: CandidateDistribution | None,
    horizons: list[float] | None,
    own_prompts: Sequence[Prompt] | None = None,
    interpolation: Interpolation | None = None,
    decoding: DecodingSettings = DEFAULT_DECODING,
    lookup: NgramDrafter | None = None,
    sampling: Sampling | None = None,
    samples: int = 1,
    best: int = 1,
    consensus: int = 0,
    on_failure: OnFailure | None = None,
    on_token: OnToken | None = None,
    reporter: Reporter | None = None,
) -> Generation:
    started = time.perf_counter()
    if adapter is not None:
        adapter.card.model.require(ModelIdentity.from_card(plm.card), "The adapter", "the server")
    tokenizer = plm.tokenizer
    prompt_ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    own_ids = None if own_prompts is None else [tokenizer.encode_prompt(prompt) for prompt in own_prompts]
    numbers = []  # of the texts that can be answered
    for number, ids in enumerate(prompt_ids):
        try:
            require_room(plm, ids, place=f"text {number + 1}")
            numbers.append(number)
        except InvalidData as error:
            if on_failure is None:
                raise
            on_failure(number, error)
    drawn: list[int | None] = list(range(samples))
    if consensus:
        drawn = [None, *range(consensus)]
        sampling = replace(sampling or Sampling(CONSENSUS_TEMPERATURE), known_only=adapter is not None)
    # Samples of the same prompt one after another: they share all of its attention states.
    stop_ids = task.stop_ids(tokenizer) | frozenset(plm.card.eos_token_ids)
    continuations, usage = generate_ids(
        plm,
        [prompt_ids[number] for number in numbers for _ in drawn],
        adapter=adapter,
        interpolation=interpolation or (adapter.card.interpolation if adapter else Interpolation(schedule="none")),
        horizons=None if horizons is None else [horizons[number] for number in numbers for _ in drawn],
        own_prompts=None if own_ids is None else [own_ids[number] for number in numbers for _ in drawn],
        stop_ids=stop_ids,
        settings=decoding,
        sampling=sampling,
        samples=drawn * len(numbers),
        lookup=lookup,
        on_token=None if on_token is None else lambda at, token: on_token(numbers[at // len(drawn)], token),
        reporter=reporter,
    )
    answers = [[""] for _ in prompts]
    choices: list[list[TokenChoice]] = [[] for _ in prompts]
    for at, number in enumerate(numbers):
        own = continuations[at * len(drawn) : (at + 1) * len(drawn)]
        texts = [task.answer(one.token_ids, tokenizer) for one in own]
        order = _by_likelihood(own)
        if consensus:
            order = rank_by_expected_chrf(texts, [one.token_ids[-1] in stop_ids for one in own])
        answers[number] = [texts[n] for n in order[:best]]
        choices[number] = own[order[0]].choices
    return Generation(
        best=answers,
        choices=choices,
        usage=usage,
        seconds=time.perf_counter() - started,
    )


def _by_likelihood(continuations: Sequence[Continuation]) -> list[int]:
    """Their numbers, the most probable one first: by the mean over its tokens, since the sum prefers short texts."""
    mean_logprobs = [one.logprob / len(one.token_ids) for one in continuations]
    return sorted(range(len(continuations)), key=lambda number: -mean_logprobs[number])

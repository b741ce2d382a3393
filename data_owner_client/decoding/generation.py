"""Generation of texts from texts: prompts are made and tokenized, continuations ranked and decoded."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, Unpack

from data_owner_client.adapter.bounds import DEFAULT_REPETITION_LIMIT
from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.data.example_retrieval import with_retrieved_examples
from data_owner_client.data.pairs import Source, text_of
from data_owner_client.data.reading.problems import text_origin
from data_owner_client.data.stops import StopMatcher, Stops
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.client_drafts import NgramDrafter
from data_owner_client.decoding.decode_loop import (
    PLM_ONLY,
    Continuation,
    GenerationConfig,
    GenerationRequest,
    require_room,
)
from data_owner_client.decoding.decode_loop import generate as generate_ids
from data_owner_client.decoding.failures import OnFailure, TextFailures, list_of_texts
from data_owner_client.decoding.mbr import rank_by_expected_chrf
from data_owner_client.decoding.sequence import End
from data_owner_client.decoding.settings import DEFAULT_DECODING, DecodingSettings, SamplingSettings
from data_owner_client.decoding.speculative import GenerationStats
from data_owner_client.decoding.token_selection import TokenChoice
from data_owner_client.memory.store import TRAIN, ExternalMemory
from data_owner_client.plm.identity import ModelIdentity
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.plm.tokenizer import Prompt
from data_owner_client.runtime.arguments import AnyPath, require_loaded, to_path
from data_owner_client.runtime.progress import Reporter
from protocol.errors import InvalidData

CONSENSUS_TEMPERATURE = 0.6
"""Temperature of a consensus's draws: sharper than the mixture, so that few draws do as well as many."""

OnToken = Callable[[int, int], None]
"""Called with the index of a text and the id of a token."""
OnText = Callable[[int, str], None]
"""Called with the index of a text and its beginning so far, which is final."""


@dataclass(frozen=True)
class Generation:
    """Generated texts, in the order of the inputs.

    Attributes:
        best: for each input the requested texts, the most probable first, or by consensus the most agreed first.
        choices: tokens of the first text of each input, with their scores.
        stats: counts and times.
        seconds: duration of the whole.
    """

    best: list[list[str]]
    choices: list[list[TokenChoice]]
    stats: GenerationStats
    seconds: float

    @property
    def texts(self) -> list[str]:
        """The first text of each input."""
        return [texts[0] for texts in self.best]

    def stripped(self) -> Generation:
        """A copy whose texts have no surrounding space."""
        return replace(self, best=[[text.strip() for text in texts] for texts in self.best])

    @property
    def token_ids(self) -> list[list[int]]:
        """Token ids of the first text of each input."""
        return [[choice.token for choice in choices] for choices in self.choices]


class GenerationOptions(TypedDict, total=False):
    """Options of a generation; each may be omitted.

    Attributes:
        interpolation: schedule or gate of λ; None for the one that training chose.
        decoding: length, bounds, look-ahead and batch size.
        stop: text, or several, before which a text ends, beside the other stops; None for no more.
        lookup: drafter from a memory's targets (`ngram_drafter_for`); the PLM's owner sees its drafts. None for none.
        sampling: settings of sampling; None for the most probable tokens. The text depends on the seed, not on drafts.
        samples: texts to draw for each input.
        best: texts to return for each input, the most probable of `samples` first.
        consensus: texts to draw for each input beside the most probable one. All are ranked by their likeness to one
            another (`decoding.mbr`). It replaces `samples`, and uses `CONSENSUS_TEMPERATURE` without `sampling`. With
            an adapter only candidates are drawn, which needs no whole LM head. 0 for no consensus.
        on_failure: called for each text that cannot be answered, whose result is then empty. None to raise the error.
        on_token: called for every token as soon as it is final; None for no call.
        on_text: called whenever the beginning of a text may have grown that is final; None for no call. What may become
            a stop or a repetition is left out. Of several texts for an input, this is the first one drawn.
        reporter: shows the progress; None for none.
    """

    interpolation: Interpolation | None
    decoding: DecodingSettings
    stop: str | Iterable[str] | None
    lookup: NgramDrafter | None
    sampling: SamplingSettings | None
    samples: int
    best: int
    consensus: int
    on_failure: OnFailure | None
    on_token: OnToken | None
    on_text: OnText | None
    reporter: Reporter | None


def require_draws(sampling: SamplingSettings | None, *, samples: int, best: int, consensus: int) -> None:
    """Check the numbers of texts of each input.

    Args:
        sampling: settings of sampling; None for the most probable tokens.
        samples: texts to draw.
        best: texts to return.
        consensus: texts to draw beside the most probable one; 0 for no consensus.

    Raises:
        InvalidData: a number is too small, or the options contradict each other.
    """
    for name, count, least in (("samples", samples, 1), ("best", best, 1), ("consensus", consensus, 0)):
        if count < least:
            raise InvalidData(f"{name} is {count!r}.", hint=f"It must be ≥ {least}.")
    if consensus and samples > 1:
        raise InvalidData("--consensus and --samples both say how many texts to draw.", hint="Give one of them.")
    texts = consensus + 1 if consensus else samples
    if best > texts:
        raise InvalidData(
            f"{best} best of {texts} were asked for.", hint="Give more --samples, or a --consensus of more."
        )
    if samples > 1 and not (sampling and sampling.temperature):
        raise InvalidData("Without a temperature all samples are the same.", hint="Give --temperature, such as 0.8.")


@dataclass(frozen=True)
class _Options:
    """The options with their defaults."""

    interpolation: Interpolation | None = None
    decoding: DecodingSettings = DEFAULT_DECODING
    stop: str | Iterable[str] | None = ()
    lookup: NgramDrafter | None = None
    sampling: SamplingSettings | None = None
    samples: int = 1
    best: int = 1
    consensus: int = 0
    on_failure: OnFailure | None = None
    on_token: OnToken | None = None
    on_text: OnText | None = None
    reporter: Reporter | None = None

    def __post_init__(self) -> None:
        require_draws(self.sampling, samples=self.samples, best=self.best, consensus=self.consensus)

    def config(
        self, adapter: CandidateDistribution | None, stops: Stops, sampling: SamplingSettings | None
    ) -> GenerationConfig:
        """The configuration of the decode loop.

        Args:
            adapter: the data owner's adapter; None for the PLM alone.
            stops: ends of the texts, without those of the options.
            sampling: settings of sampling, from `draws`.
        """
        return GenerationConfig(
            adapter=adapter,
            interpolation=self._interpolation(adapter),
            stops=stops.with_texts([self.stop] if isinstance(self.stop, str) else self.stop or ()),
            repetition_limit=self._repetition_limit(adapter),
            settings=self.decoding,
            sampling=sampling,
            lookup=self.lookup,
        )

    def length_bound(self, adapter: CandidateDistribution, source_tokens: int) -> int | None:
        """The longest plausible answer to a source text, in tokens; None for no bound."""
        wanted, bounds = self.decoding.length_bound, adapter.card.bounds
        bounded = wanted or (wanted is None and self._uses(adapter))
        return bounds.max_tokens(source_tokens) if bounded and bounds else None

    def _repetition_limit(self, adapter: CandidateDistribution | None) -> int | None:
        """Repeated tokens at which a text ends; None for any number."""
        wanted, bounds = self.decoding.repetition_bound, adapter.card.bounds if adapter else None
        # The texts of an old card, which has no bounds, stay as they are.
        if wanted or (wanted is None and bounds is not None and self._uses(adapter)):
            return bounds.repetition_limit if bounds else DEFAULT_REPETITION_LIMIT
        return None

    def _interpolation(self, adapter: CandidateDistribution | None) -> Interpolation:
        return self.interpolation or (adapter.card.interpolation if adapter else PLM_ONLY)

    def _uses(self, adapter: CandidateDistribution | None) -> bool:
        """Return False if the PLM generates the texts alone."""
        return adapter is not None and not self._interpolation(adapter).finished(0, 1.0)

    def draws(self, adapter: CandidateDistribution | None) -> tuple[list[int | None], SamplingSettings | None]:
        """The sample numbers of each input's continuations (see `GenerationRequest.sample`), and their sampling."""
        if not self.consensus:
            return list(range(self.samples)), self.sampling
        sampling = self.sampling or SamplingSettings(temperature=CONSENSUS_TEMPERATURE)
        return [None, *range(self.consensus)], replace(sampling, candidates_only=adapter is not None)


@dataclass(frozen=True)
class _Input:
    """One text to answer.

    Attributes:
        number: index of the text.
        prompt: prompt of the PLM.
        expected_length: SL in tokens; None without an adapter.
        adapter_prompt: prompt of the adapter; None for `prompt`.
        length_bound: longest plausible answer in tokens; None for no bound.
    """

    number: int
    prompt: Prompt
    expected_length: float | None = None
    adapter_prompt: Prompt | None = None
    length_bound: int | None = None


def translate(
    plm: RemotePlm,
    sources: Iterable[Source],
    *,
    adapter: CandidateDistribution | None = None,
    task: Task | None = None,
    **options: Unpack[GenerationOptions],
) -> Generation:
    """Answer texts or conversations with a task's prompt. The answer of a blank text is empty, and nothing is sent.

    Args:
        plm: the PLM.
        sources: texts, or conversations whose last turn is answered.
        adapter: the data owner's adapter; None for the PLM alone.
        task: task of the prompt; None for the adapter's task.
        options: see `GenerationOptions`.

    Raises:
        InvalidData: neither adapter nor task is given, options contradict each other, or a text is too long.
        IdentityMismatch: the adapter belongs to another model.
    """
    require_loaded(adapter, "The adapter", "TrainedAdapter.load(path)")
    require_loaded(task, "The task", "load_task(name_or_path)")
    sources = list_of_texts(sources)
    task = task or (adapter.card.task if adapter else None)
    if task is None:
        raise InvalidData("Without an adapter there is no task.", hint="Give one with --task.")
    chosen, tokenizer = _Options(**options), plm.tokenizer
    # The adapter learned prompts of the day when its memory was begun.
    task = task.on_day(adapter.card.task.date if adapter else None, tokenizer)

    def to_input(number: int, source: Source) -> _Input:
        prompt = task.prompt(source, tokenizer)
        if adapter is None:
            return _Input(number, prompt)
        tokens = tokenizer.count(text_of(source))
        bound = chosen.length_bound(adapter, tokens)
        return _Input(number, prompt, adapter.card.expected_length(tokens), length_bound=bound)

    failures = TextFailures(chosen.on_failure)
    inputs = failures.each(sources, to_input)
    if adapter and adapter.retriever:
        questions = [sources[each.number] for each in inputs]
        tasks = with_retrieved_examples(plm, task, questions, adapter.retriever)
        inputs = [
            replace(each, prompt=own.prompt(question, tokenizer), adapter_prompt=each.prompt)
            for each, own, question in zip(inputs, tasks, questions, strict=True)
        ]
    stops, on_text = task.stops(tokenizer, plm.card.eos_token_ids), chosen.on_text
    if on_text is not None:
        chosen = replace(chosen, on_text=lambda number, text: on_text(number, text.strip()))
    return _generate(plm, inputs, len(sources), failures, stops, adapter, chosen).stripped()


def generate(
    plm: RemotePlm,
    prompts: Iterable[str],
    *,
    adapter: CandidateDistribution | None = None,
    **options: Unpack[GenerationOptions],
) -> Generation:
    """Continue prompts as they are, without a task's template around them, and return exactly what follows them.

    Nothing follows a blank prompt.
    A text ends where the model ends it, before a text of the option `stop`, or at full length.

    A bare prompt has no source text to predict a length from. Gradual Unrolling then uses the mean target length of the
    memory, and there is no length bound.

    Args:
        plm: the PLM.
        prompts: texts.
        adapter: the data owner's adapter; None for the PLM alone.
        options: see `GenerationOptions`.

    Raises:
        InvalidData: options contradict each other, or a text is too long.
        IdentityMismatch: the adapter belongs to another model.
    """
    require_loaded(adapter, "The adapter", "TrainedAdapter.load(path)")
    prompts = list_of_texts(prompts)
    expected_length = adapter.card.mean_length if adapter else None
    chosen, stops = _Options(**options), Stops(ids=frozenset(plm.card.eos_token_ids))
    failures = TextFailures(chosen.on_failure)
    inputs = failures.each(prompts, lambda number, prompt: _Input(number, Prompt(prompt), expected_length))
    return _generate(plm, inputs, len(prompts), failures, stops, adapter, chosen)


def ngram_drafter_for(memory: AnyPath) -> NgramDrafter:
    """A drafter from the targets of a memory.

    The PLM's owner sees the drafts, so it must have seen the targets before.

    Raises:
        InvalidData: the memory's targets were not shared, or the memory is missing or damaged.
    """
    part = ExternalMemory(to_path(memory) / TRAIN)
    if part.manifest.plan.context_mode != "teacher-forced":
        raise InvalidData(
            f"The targets of {memory} were never shown to the PLM's owner, and drafts would be pieces of them.",
            hint="Leave --lookup away, or use a memory that was built with --share-targets.",
        )
    # Shard by shard, to drop the representations: they are nearly all of a memory and not needed.
    return NgramDrafter(ids_T.tolist() for rows in part.shards() for ids_T in rows.target_N.split(rows.rows_E.tolist()))


def _generate(
    plm: RemotePlm,
    inputs: Sequence[_Input],
    total: int,
    failures: TextFailures,
    stops: Stops,
    adapter: CandidateDistribution | None,
    options: _Options,
) -> Generation:
    """Generate for the inputs; the other texts of `total` have empty answers."""
    started = time.perf_counter()
    if adapter is not None:
        adapter.card.model.require(ModelIdentity.from_card(plm.card), "The adapter", "the server")
    requests, numbers = _answerable(plm, inputs, failures)
    failures.settle(total)
    samples, sampling = options.draws(adapter)
    config = options.config(adapter, stops, sampling)
    listeners = _Listeners(numbers, len(samples), StopMatcher(plm.tokenizer, config.stops), options)
    continuations, stats = generate_ids(
        plm,
        # Samples of the same prompt one after another: they share all of its attention states.
        [replace(request, sample=sample) for request in requests for sample in samples],
        config,
        on_token=listeners.on_token if options.on_token or options.on_text else None,
        reporter=options.reporter,
    )
    answers = [[""] for _ in range(total)]
    choices: list[list[TokenChoice]] = [[] for _ in range(total)]
    for at, number in enumerate(numbers):
        alternatives = continuations[at * len(samples) : (at + 1) * len(samples)]
        texts = [one.text for one in alternatives]
        order = _by_likelihood(alternatives)
        if options.consensus:
            order = rank_by_expected_chrf(texts, [one.end is End.STOP for one in alternatives])
        answers[number] = [texts[n] for n in order[: options.best]]
        choices[number] = alternatives[order[0]].choices
    return Generation(best=answers, choices=choices, stats=stats, seconds=time.perf_counter() - started)


class _Listeners:
    """Calls of `on_token` and `on_text` while texts grow.

    Args:
        numbers: index of the text behind each group of requests.
        samples: requests of a group.
        stops: finds the stops.
        options: the functions to call.
    """

    def __init__(self, numbers: Sequence[int], samples: int, stops: StopMatcher, options: _Options) -> None:
        self._numbers = numbers
        self._samples = samples
        self._stops = stops
        self._options = options
        self._ids = defaultdict[int, list[int]](list)

    def on_token(self, request: int, token: int) -> None:
        """Report a token of a request."""
        number, sample = self._numbers[request // self._samples], request % self._samples
        if self._options.on_token is not None:
            self._options.on_token(number, token)
        if self._options.on_text is not None and sample == 0:
            self._ids[number].append(token)
            self._options.on_text(number, self._stops.settled_text(self._ids[number]))


def _answerable(
    plm: RemotePlm, inputs: Sequence[_Input], failures: TextFailures
) -> tuple[list[GenerationRequest], list[int]]:
    """Requests of the inputs that leave room for an answer, and the indices of these texts."""
    requests, numbers = list[GenerationRequest](), list[int]()
    encode = plm.tokenizer.encode_prompt
    for each in inputs:
        with failures.caught(each.number):
            ids = encode(each.prompt)
            require_room(plm, ids, text_origin(each.number))
            adapter_ids = None if each.adapter_prompt is None else encode(each.adapter_prompt)
            requests.append(GenerationRequest(ids, each.expected_length, adapter_ids, length_bound=each.length_bound))
            numbers.append(each.number)
    return requests, numbers


def _by_likelihood(continuations: Sequence[Continuation]) -> list[int]:
    """Indices sorted by mean log-probability per token, highest first; a sum would prefer short texts."""
    mean_logprobs = [one.logprob / len(one.token_ids) for one in continuations]
    return sorted(range(len(continuations)), key=lambda index: -mean_logprobs[index])

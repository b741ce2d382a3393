"""Generation of texts from texts: prompts are made and tokenized, continuations ranked and decoded."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Unpack

from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.data.chat_turns import single_text
from data_owner_client.data.pairs import Source, text_of
from data_owner_client.data.reading.problems import text_origin
from data_owner_client.data.stops import StopMatcher, Stops
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.client_drafts import NgramDrafter
from data_owner_client.decoding.decode_loop import Continuation, GenerationRequest, require_room
from data_owner_client.decoding.decode_loop import generate as generate_ids
from data_owner_client.decoding.failures import TextFailures, list_of_texts
from data_owner_client.decoding.held.grammar import AnswerGrammar
from data_owner_client.decoding.inputs import TextInput, text_inputs
from data_owner_client.decoding.labels.classification import classify, with_labels
from data_owner_client.decoding.mbr import rank_by_expected_chrf
from data_owner_client.decoding.options import ChosenOptions, GenerationOptions
from data_owner_client.decoding.results import Generation as Generation
from data_owner_client.decoding.sequence import End
from data_owner_client.decoding.token_choice import TokenChoice
from data_owner_client.memory.store import TRAIN, ExternalMemory
from data_owner_client.plm.identity import ModelIdentity
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.plm.tokenizer import Prompt
from data_owner_client.runtime.arguments import AnyPath, require_loaded, to_path
from protocol.errors import InvalidData


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
    chosen, tokenizer = ChosenOptions(**options), plm.tokenizer
    # The adapter learned prompts of the day when its memory was begun.
    task = with_labels(task.on_day(adapter.card.task.date if adapter else None, tokenizer), adapter)

    _require_same_model(plm, adapter)
    if task.kind == "classify":
        chosen.require_scored_labels()
    failures = TextFailures(sources, chosen.on_failure)
    inputs = text_inputs(plm, task, sources, adapter, failures)
    if task.kind == "classify":
        return classify(plm, task, sources, inputs, failures, adapter, chosen)
    if adapter is not None:
        inputs = [
            replace(each, length_bound=chosen.length_bound(adapter, tokenizer.count(text_of(sources[each.number]))))
            for each in inputs
        ]
    stops, on_text = task.stops(tokenizer, plm.card.eos_token_ids), chosen.on_text
    if on_text is not None:
        chosen = replace(chosen, on_text=lambda number, text: on_text(number, text.strip()))
    chosen = replace(chosen, form=chosen.answer_form(task))
    return _generate(plm, inputs, len(sources), failures, stops, adapter, chosen).stripped()


def generate(
    plm: RemotePlm,
    prompts: Iterable[Source],
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
        prompts: texts. Of a conversation that is a single question, the text.
        adapter: the data owner's adapter; None for the PLM alone.
        options: see `GenerationOptions`.

    Raises:
        InvalidData: options contradict each other, or a text is too long.
        IdentityMismatch: the adapter belongs to another model.
    """
    require_loaded(adapter, "The adapter", "TrainedAdapter.load(path)")
    _require_same_model(plm, adapter)
    prompts = list_of_texts(prompts)
    expected_length = adapter.card.mean_length if adapter else None
    chosen, stops = ChosenOptions(**options), Stops(ids=frozenset(plm.card.eos_token_ids))
    chosen = replace(chosen, form=chosen.answer_form(None))
    failures = TextFailures(prompts, chosen.on_failure)

    def to_input(number: int, prompt: Source) -> TextInput:
        return TextInput(number, Prompt(single_text(prompt)), expected_length)

    inputs = failures.each(to_input)
    return _generate(plm, inputs, len(prompts), failures, stops, adapter, chosen)


def _require_same_model(plm: RemotePlm, adapter: CandidateDistribution | None) -> None:
    """Refuse an adapter of another model.

    Raises:
        IdentityMismatch: the adapter belongs to another model.
    """
    if adapter is not None:
        adapter.card.model.require(ModelIdentity.from_card(plm.card), "The adapter", "the server")


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
    inputs: Sequence[TextInput],
    total: int,
    failures: TextFailures,
    stops: Stops,
    adapter: CandidateDistribution | None,
    options: ChosenOptions,
) -> Generation:
    """Generate for the inputs; the other texts of `total` have empty answers."""
    started = time.perf_counter()
    requests, numbers = _answerable(plm, inputs, failures)
    failures.settle(total)
    samples, sampling = options.draws(adapter)
    config = options.config(adapter, stops, sampling)
    grammar = None
    if options.form is not None:
        grammar = AnswerGrammar(options.form, plm.tokenizer, config.stops, plm.card.vocab_size)
    listeners = _Listeners(numbers, len(samples), StopMatcher(plm.tokenizer, config.stops), options)
    continuations, stats = generate_ids(
        plm,
        # Samples of the same prompt one after another: they share all of its attention states.
        [replace(request, sample=sample, grammar=grammar) for request in requests for sample in samples],
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

    def __init__(self, numbers: Sequence[int], samples: int, stops: StopMatcher, options: ChosenOptions) -> None:
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
    plm: RemotePlm, inputs: Sequence[TextInput], failures: TextFailures
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

"""Preparation of texts: prompts are made and tokenized, and become sequences to generate.

A sequence may then be generated in any company; its text does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.data.chat_turns import single_text
from data_owner_client.data.pairs import Source, text_of
from data_owner_client.data.reading.problems import text_origin
from data_owner_client.data.stops import StopMatcher, Stops
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.decode_loop import (
    Continuation,
    GenerationRequest,
    continuation_of,
    require_room,
    sequences_of,
)
from data_owner_client.decoding.failures import TextFailures, list_of_texts
from data_owner_client.decoding.held.grammar import AnswerGrammar
from data_owner_client.decoding.inputs import TextInput, text_inputs
from data_owner_client.decoding.labels.classification import with_labels
from data_owner_client.decoding.mbr import rank_by_expected_chrf
from data_owner_client.decoding.options import ChosenOptions
from data_owner_client.decoding.sequence import End, SequenceState
from data_owner_client.decoding.token_choice import TokenChoice
from data_owner_client.plm.identity import ModelIdentity
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.plm.tokenizer import Prompt
from data_owner_client.runtime.arguments import require_loaded
from protocol.errors import InvalidData


@dataclass(frozen=True)
class PreparedTexts:
    """Texts as sequences to generate.

    Attributes:
        total: number of the inputs.
        numbers: index of each input that is answered; the others have empty answers.
        sequences: the sequences of these inputs, equally many of each, one input after another.
        options: options of the generation.
        strips: whether texts lose their surrounding space.
    """

    total: int
    numbers: Sequence[int]
    sequences: Sequence[SequenceState]
    options: ChosenOptions
    strips: bool

    def groups(self) -> list[tuple[int, Sequence[SequenceState]]]:
        """The index of each answered input, and its sequences."""
        size = len(self.sequences) // max(1, len(self.numbers))
        return [(number, self.sequences[at * size : (at + 1) * size]) for at, number in enumerate(self.numbers)]

    def ranked(self) -> list[list[Continuation]]:
        """The continuations of each answered input, the best first; once all sequences have ended."""
        ranked = []
        for _, sequences in self.groups():
            found = [continuation_of(sequence) for sequence in sequences]
            order = _by_likelihood(found)
            if self.options.search.consensus:
                texts = [self.text(one.text) for one in found]
                order = rank_by_expected_chrf(texts, [one.end is End.STOP for one in found])
            ranked.append([found[number] for number in order])
        return ranked

    def answers(self, ranked: Sequence[Sequence[Continuation]]) -> tuple[list[list[str]], list[list[TokenChoice]]]:
        """The texts of each input, the best first, and the tokens of the best.

        Args:
            ranked: the continuations of each answered input, the best first.
        """
        texts: list[list[str]] = [[""] for _ in range(self.total)]
        choices: list[list[TokenChoice]] = [[] for _ in range(self.total)]
        for number, found in zip(self.numbers, ranked, strict=True):
            texts[number] = [self.text(one.text) for one in found[: self.options.best]]
            choices[number] = found[0].choices
        return texts, choices

    def text(self, text: str) -> str:
        """A text as it is given out."""
        return text.strip() if self.strips else text


def prepare_answers(
    plm: RemotePlm,
    sources: Iterable[Source],
    adapter: CandidateDistribution | None,
    task: Task,
    options: ChosenOptions,
) -> PreparedTexts:
    """Texts or conversations behind a task's prompt, as sequences to generate.

    Args:
        plm: the PLM.
        sources: texts, or conversations whose last turn is answered.
        adapter: the data owner's adapter; None for the PLM alone.
        task: task of the prompts, from `task_for`; not of the kind `classify`.
        options: options of the generation.

    Raises:
        InvalidData: options contradict each other, or a text is too long.
        IdentityMismatch: the adapter belongs to another model.
    """
    sources, tokenizer = list_of_texts(sources), plm.tokenizer
    failures = TextFailures(sources, options.on_failure)
    inputs = text_inputs(plm, task, sources, adapter, failures)
    if adapter is not None:
        inputs = [
            replace(each, length_bound=options.length_bound(adapter, tokenizer.count(text_of(sources[each.number]))))
            for each in inputs
        ]
    options = replace(options, form=options.answer_form(task))
    stops = task.stops(tokenizer, plm.card.eos_token_ids)
    return _prepared(plm, inputs, len(sources), failures, stops, adapter, options, strips=True)


def prepare_continuations(
    plm: RemotePlm, prompts: Iterable[Source], adapter: CandidateDistribution | None, options: ChosenOptions
) -> PreparedTexts:
    """Bare prompts as sequences to generate; see `generate`.

    Raises:
        InvalidData: options contradict each other, or a text is too long.
        IdentityMismatch: the adapter belongs to another model.
    """
    require_same_model(plm, adapter)
    prompts = list_of_texts(prompts)
    failures = TextFailures(prompts, options.on_failure)

    def to_input(number: int, prompt: Source) -> TextInput:
        return TextInput(number, Prompt(single_text(prompt)), _mean_length(adapter))

    inputs = failures.each(to_input)
    stops, options = _bare_stops(plm), replace(options, form=options.answer_form(None))
    return _prepared(plm, inputs, len(prompts), failures, stops, adapter, options, strips=False)


def prepare_token_prompts(
    plm: RemotePlm, prompts: Sequence[Sequence[int]], adapter: CandidateDistribution | None, options: ChosenOptions
) -> PreparedTexts:
    """Bare prompts in token ids as sequences to generate. Answers in a form lose the space that it allows around them.

    Raises:
        InvalidData: options contradict each other, or a prompt is too long.
        IdentityMismatch: the adapter belongs to another model.
    """
    require_same_model(plm, adapter)
    options = replace(options, form=options.answer_form(None))
    requests = [GenerationRequest(list(ids), _mean_length(adapter)) for ids in prompts]
    numbers, strips = range(len(prompts)), options.form is not None
    return _of_requests(plm, requests, numbers, len(prompts), _bare_stops(plm), adapter, options, strips=strips)


def _mean_length(adapter: CandidateDistribution | None) -> float | None:
    """Expected length of an answer without a source text, in tokens."""
    return adapter.card.mean_length if adapter else None


def _bare_stops(plm: RemotePlm) -> Stops:
    """The ends of a continuation without a task."""
    return Stops(ids=frozenset(plm.card.eos_token_ids))


def task_for(plm: RemotePlm, task: Task | None, adapter: CandidateDistribution | None) -> Task:
    """The task of prompts: the given one or the adapter's, with the labels and the day of the adapter's memory.

    Raises:
        InvalidData: neither adapter nor task is given.
        IdentityMismatch: the adapter belongs to another model.
    """
    require_loaded(adapter, "The adapter", "TrainedAdapter.load(path)")
    require_loaded(task, "The task", "load_task(name_or_path)")
    task = task or (adapter.card.task if adapter else None)
    if task is None:
        raise InvalidData("Without an adapter there is no task.", hint="Give one with --task.")
    # The adapter learned prompts of the day when its memory was begun.
    task = with_labels(task.on_day(adapter.card.task.date if adapter else None, plm.tokenizer), adapter)
    require_same_model(plm, adapter)
    return task


def require_same_model(plm: RemotePlm, adapter: CandidateDistribution | None) -> None:
    """Refuse an adapter of another model.

    Raises:
        IdentityMismatch: the adapter belongs to another model.
    """
    if adapter is not None:
        adapter.card.model.require(ModelIdentity.from_card(plm.card), "The adapter", "the server")


def _prepared(
    plm: RemotePlm,
    inputs: Sequence[TextInput],
    total: int,
    failures: TextFailures,
    stops: Stops,
    adapter: CandidateDistribution | None,
    options: ChosenOptions,
    *,
    strips: bool,
) -> PreparedTexts:
    """The inputs as sequences; the other texts of `total` have empty answers."""
    requests, numbers = _answerable(plm, inputs, failures)
    failures.settle(total)
    return _of_requests(plm, requests, numbers, total, stops, adapter, options, strips=strips)


def _of_requests(
    plm: RemotePlm,
    requests: Sequence[GenerationRequest],
    numbers: Sequence[int],
    total: int,
    stops: Stops,
    adapter: CandidateDistribution | None,
    options: ChosenOptions,
    *,
    strips: bool = False,
) -> PreparedTexts:
    """Requests with the indices of their inputs as sequences, one for each sample."""
    samples, sampling = options.draws(adapter)
    config = options.config(adapter, stops, sampling)
    grammar = None
    if options.form is not None:
        grammar = AnswerGrammar(options.form, plm.tokenizer, config.stops, plm.card.vocab_size)
    # Samples of the same prompt one after another: they share all of its attention states.
    requests = [
        replace(request, sample=sample, grammar=grammar, prefix=options.prefix, alternatives=options.alternatives)
        for request in requests
        for sample in samples
    ]
    sequences = sequences_of(plm, requests, config, options.reporter)
    prepared = PreparedTexts(total, numbers, sequences, options, strips)
    if options.on_token is not None or options.on_text is not None:
        for number, group in prepared.groups():
            for sample, sequence in enumerate(group):
                listener = _Listener(number, sequence.rules.stops, prepared, shows_text=sample == 0)
                sequence.on_choices = listener.on_choices
    return prepared


class _Listener:
    """Calls of `on_token` and `on_text` while a text grows.

    Args:
        number: index of the input.
        stops: finds the stops.
        prepared: has the functions to call.
        shows_text: whether `on_text` is called.
    """

    def __init__(self, number: int, stops: StopMatcher, prepared: PreparedTexts, *, shows_text: bool) -> None:
        options = prepared.options
        self._on_token = options.on_token and partial(options.on_token, number)
        self._on_text = partial(options.on_text, number) if options.on_text is not None and shows_text else None
        self._stops = stops
        self._text: Callable[[str], str] = prepared.text
        self._ids = list[int]()

    def on_choices(self, choices: Sequence[TokenChoice]) -> None:
        """Report tokens that have become final."""
        for choice in choices:
            self._ids.append(choice.token)
            if self._on_token is not None:
                self._on_token(choice.token)
        if self._on_text is not None:
            self._on_text(self._text(self._stops.settled_text(self._ids)))


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

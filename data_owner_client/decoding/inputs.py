"""Texts as they are answered: behind their prompts, with what the adapter's λ and bounds depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.data.example_retrieval import with_retrieved_examples
from data_owner_client.data.pairs import Source, text_of
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.failures import TextFailures
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.plm.tokenizer import Prompt


@dataclass(frozen=True)
class TextInput:
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


def text_inputs(
    plm: RemotePlm,
    task: Task,
    sources: Sequence[Source],
    adapter: CandidateDistribution | None,
    failures: TextFailures,
) -> list[TextInput]:
    """The texts that are not blank, behind the task's prompts; the PLM sees the adapter's retrieved examples, if any.

    Args:
        plm: the PLM.
        task: task of the prompts.
        sources: all texts.
        adapter: the data owner's adapter; None for the PLM alone.
        failures: receives the texts that have no prompt.
    """
    tokenizer = plm.tokenizer

    def to_input(number: int, source: Source) -> TextInput:
        expected_length = adapter.card.expected_length(tokenizer.count(text_of(source))) if adapter else None
        return TextInput(number, task.prompt(source, tokenizer), expected_length)

    inputs = failures.each(to_input)
    if adapter is None or not adapter.retriever:
        return inputs
    questions = [sources[each.number] for each in inputs]
    tasks = with_retrieved_examples(plm, task, questions, adapter.retriever)
    return [
        replace(each, prompt=own.prompt(question, tokenizer), adapter_prompt=each.prompt)
        for each, own, question in zip(inputs, tasks, questions, strict=True)
    ]

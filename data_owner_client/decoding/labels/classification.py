"""Answers of a `classify` task: labels with their probabilities."""

from __future__ import annotations

import time
from collections.abc import Sequence

from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.data.pairs import Source
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.failures import TextFailures
from data_owner_client.decoding.inputs import TextInput
from data_owner_client.decoding.labels.requests import label_requests
from data_owner_client.decoding.labels.scoring import score_labels
from data_owner_client.decoding.options import ChosenOptions
from data_owner_client.decoding.results import Generation
from data_owner_client.decoding.token_choice import TokenChoice
from data_owner_client.plm.remote_plm import RemotePlm


def with_labels(task: Task, adapter: CandidateDistribution | None) -> Task:
    """The task with the labels of the adapter's memory, if it is a `classify` task without its own."""
    if task.kind != "classify" or task.labels or adapter is None:
        return task
    return task.model_copy(update={"labels": adapter.card.task.labels})


def classify(
    plm: RemotePlm,
    task: Task,
    sources: Sequence[Source],
    inputs: Sequence[TextInput],
    failures: TextFailures,
    adapter: CandidateDistribution | None,
    options: ChosenOptions,
) -> Generation:
    """The labels of each text by probability. The other texts have empty answers.

    A length reward does not apply: the probabilities are those of the mixture.

    Args:
        plm: the PLM.
        task: a `classify` task whose labels are known.
        sources: all texts.
        inputs: the texts to answer, with their prompts.
        failures: receives the texts that cannot be answered.
        adapter: the data owner's adapter; None for the PLM alone.
        options: mixture, batch size, tolerance and reporter.

    Raises:
        InvalidData: labels cannot be answers of this task, or a text is too long.
        PemaError: a call to the PLM failed.
    """
    started = time.perf_counter()
    requests, numbers = label_requests(plm, task, sources, inputs, failures)
    failures.settle(len(sources))
    interpolation = options.interpolation_with(adapter)
    temperature = adapter.card.label_temperature if adapter else 1.0
    scored, stats = score_labels(
        plm,
        requests,
        task.labels,
        adapter=adapter,
        interpolations=[interpolation],
        temperature=temperature,
        settings=options.decoding,
        reporter=options.reporter,
    )
    best, probabilities = [[""] for _ in sources], [dict[str, float]() for _ in sources]
    choices = [list[TokenChoice]() for _ in sources]
    for group in scored:
        logprob_B_L = group.evidence.label_logprobs(interpolation)
        # Not by the rounded probabilities, which may be equal; a stable sort takes the first of equal labels.
        order_B_L = logprob_B_L.argsort(dim=-1, descending=True, stable=True)
        probability_B_L = (logprob_B_L / temperature).softmax(dim=-1)
        for text, (request, order_L) in enumerate(zip(group.numbers, order_B_L.tolist(), strict=True)):
            number = numbers[request]
            best[number] = [task.labels[label] for label in order_L]
            probabilities[number] = {task.labels[label]: float(probability_B_L[text, label]) for label in order_L}
            choices[number] = group.evidence.choices(text, order_L[0], interpolation)
            stats.tokens += len(choices[number])
    return Generation(best, choices, stats, time.perf_counter() - started, probabilities)

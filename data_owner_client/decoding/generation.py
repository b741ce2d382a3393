"""Generation of texts from texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Unpack

from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.data.pairs import Source
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.beams.search import search_beams
from data_owner_client.decoding.client_drafts import NgramDrafter
from data_owner_client.decoding.decode_loop import run
from data_owner_client.decoding.failures import TextFailures, list_of_texts
from data_owner_client.decoding.inputs import text_inputs
from data_owner_client.decoding.labels.classification import classify
from data_owner_client.decoding.options import ChosenOptions, GenerationOptions
from data_owner_client.decoding.preparation import PreparedTexts, prepare_answers, prepare_continuations, task_for
from data_owner_client.decoding.results import Generation as Generation
from data_owner_client.memory.store import TRAIN, ExternalMemory
from data_owner_client.plm.remote_plm import RemotePlm
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
    task, sources, chosen = task_for(plm, task, adapter), list_of_texts(sources), ChosenOptions(**options)
    if task.kind != "classify":
        return _generated(plm, partial(prepare_answers, plm, sources, adapter, task, chosen))
    chosen.require_scored_labels()
    failures = TextFailures(sources, chosen.on_failure)
    return classify(plm, task, sources, text_inputs(plm, task, sources, adapter, failures), failures, adapter, chosen)


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
    return _generated(plm, partial(prepare_continuations, plm, prompts, adapter, ChosenOptions(**options)))


def ngram_drafter_for(memory: AnyPath) -> NgramDrafter:
    """A drafter from the targets of a memory.

    The PLM's owner sees the drafts, so it must have seen the targets before.

    Raises:
        InvalidData: the memory's targets were not shared, or the memory is missing or damaged.
    """
    part = ExternalMemory(to_path(memory) / TRAIN)
    if part.manifest.plan.context_mode != "teacher-forced":
        raise InvalidData(
            f"The true targets of {memory} were never shown to the PLM's owner, and drafts would be pieces of them.",
            hint="Leave --lookup away, or use a memory that was built with --share-targets.",
        )
    # Shard by shard, to drop the representations: they are nearly all of a memory and not needed.
    return NgramDrafter(ids_T.tolist() for rows in part.shards() for ids_T in rows.target_N.split(rows.rows_E.tolist()))


def _generated(plm: RemotePlm, prepare: Callable[[], PreparedTexts]) -> Generation:
    """Prepare texts and generate them."""
    started = time.perf_counter()
    prepared = prepare()
    options = prepared.options
    sequences, search = prepared.sequences, options.search
    if search.beams > 1:
        ranked, stats = search_beams(
            plm,
            sequences,
            options.decoding,
            beams=search.beams,
            length_penalty=search.length_penalty,
            reporter=options.reporter,
        )
    else:
        stats = run(plm, sequences, options.decoding, options.lookup, options.reporter)
        ranked = prepared.ranked()
    best, choices = prepared.answers(ranked)
    return Generation(best=best, choices=choices, stats=stats, seconds=time.perf_counter() - started)

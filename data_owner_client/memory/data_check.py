"""Checks of files against a model: token counts, prompts as the model gets them, and the owner's quotas."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from itertools import chain, islice

from data_owner_client.data.checking.files import Part, check_files, with_problem_of_all
from data_owner_client.data.checking.report import Cost, DataReport, Example, Lengths, PartReport
from data_owner_client.data.earlier_answers import first_answers
from data_owner_client.data.label_tokens import LabelTokenizer
from data_owner_client.data.pairs import Pair
from data_owner_client.data.reading.problems import Problems
from data_owner_client.data.redaction.redactor import Redactor
from data_owner_client.data.redaction.report import report_redaction
from data_owner_client.data.redaction.rules import Redaction
from data_owner_client.data.tasks import Task, load_task
from data_owner_client.memory.build import require_redactable
from data_owner_client.memory.build_splits import task_of_memory
from data_owner_client.memory.grants import Demand, cached_distributions, shortfalls_of, tokens_needed
from data_owner_client.memory.tokenized_pairs import tokenize_pair
from data_owner_client.memory.types import ContextMode
from data_owner_client.memory.usable_pairs import UsablePairs, find_usable_pairs
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.plm.tokenizer import PlmTokenizer
from data_owner_client.runtime.progress import Reporter
from protocol.errors import InvalidData

_EXAMPLES = 3
_NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"
_TASKS = {
    "OpenAI messages": "chat",
    "ShareGPT conversations": "chat",
    "questions and answers": "answer-question",
    "SQuAD articles": "answer-question",
    "texts and summaries": "summarise",
}


def default_task(part: PartReport) -> Task:
    """The built-in task for files of this form, or else a task without an instruction."""
    if part.labels:
        return Task(name="labels", kind="classify")
    return load_task(_TASKS[part.form]) if part.form in _TASKS else Task(name="pairs")


def check_with_model(
    plm: RemotePlm,
    task: Task,
    parts: Sequence[Part],
    problems: Problems,
    *,
    memory_parts: int,
    context_mode: ContextMode = "private",
    redaction: Redaction | None = None,
    share_earlier_answers: bool = False,
    price: float | None = None,
    reporter: Reporter | None = None,
) -> DataReport:
    """Report on files as `build-memory` and `train` will use them. Only the tokenizer is fetched, and nothing is sent.

    Args:
        plm: the remote model.
        task: template of the prompts.
        parts: the files; the first ones become memories.
        problems: problems of reading; those of the model are added.
        memory_parts: number of files that become memories.
        context_mode: contexts of the memory.
        redaction: rules of a redacted memory; None for other contexts.
        share_earlier_answers: whether prompts may show earlier answers of their conversations.
        price: price of a million tokens; None for no sum of money.
        reporter: shows the progress.

    Raises:
        PemaError: a call to the PLM failed.
    """
    private = context_mode == "private"
    learned: list[Sequence[Pair]] = [part.pairs for part in parts]
    if private and not share_earlier_answers:
        learned[:memory_parts] = map(first_answers, learned[:memory_parts])
    try:
        task = task_of_memory(task, plm.tokenizer, learned[:memory_parts])
    except InvalidData as error:  # such as too many labels
        return with_problem_of_all(check_files(parts, problems), error)
    reporter = reporter or Reporter()
    redactor = Redactor(redaction, secrets.token_bytes(32), plm.tokenizer) if redaction else None
    if redactor:
        try:
            require_redactable(task)
            task = redactor.redact_task(task)
        except InvalidData as error:
            return with_problem_of_all(check_files(parts, problems), error)
    demand, usable = Demand(context_mode), list[UsablePairs]()
    for at, (part, pairs) in enumerate(zip(parts, learned, strict=True)):
        is_learned = at < memory_parts
        shown = redactor.redact_pairs(task, pairs, reporter, held_out=at > 0) if redactor and is_learned else None
        found = find_usable_pairs(
            plm, task, pairs, problems, drafted=private and is_learned, shown=shown, reporter=reporter
        )
        usable.append(found)
        _measure(part.report, found)
        if at < memory_parts:
            demand.add(found.sizes, found.target_ids)
    if task.kind == "classify":
        # Without a file for validation, pairs like the first ones are held out.
        demand.add_choice(usable[memory_parts - 1].sizes, LabelTokenizer(plm.tokenizer, task.labels).check(task))
    report = check_files(parts, problems, task.labels)
    report.task = task.name
    report.examples = [_example(plm, task, pair) for pair in islice(usable[0].pairs, _EXAMPLES)]
    left_out = sum(len(part.pairs) - len(pairs) for part, pairs in zip(parts, learned, strict=True))
    report.cost = _cost(plm, demand, left_out, price)
    if redaction:
        report.redaction = report_redaction(redaction, chain(*learned[:memory_parts]), plm.tokenizer)
    return report


def _measure(report: PartReport, found: UsablePairs) -> None:
    """Replace the lengths in characters by those in tokens."""
    sizes = found.sizes
    report.unit = "tokens"
    report.sources = Lengths.of([whole - target for whole, target in zip(sizes.sequence, sizes.target, strict=True)])
    report.targets = Lengths.of(sizes.target)


def _example(plm: RemotePlm, task: Task, pair: Pair) -> Example:
    prompt, _ = task.prompt_and_target(pair, plm.tokenizer)
    tokens = tokenize_pair(plm, task, pair)
    return Example(prompt=prompt.text, target=_texts_of_tokens(plm.tokenizer, tokens.target))


def _texts_of_tokens(tokenizer: PlmTokenizer, token_ids: list[int]) -> list[str]:
    """The text of each token; a character of several tokens belongs to the last of them."""
    special, texts, before = set(tokenizer.special_ids.values()), list[str](), ""
    for end, token in enumerate(token_ids, 1):
        text = tokenizer.decode_continuation(token_ids[:end])
        if token in special:
            texts.append(tokenizer.name(token))
        elif text.endswith(_NO_CHARACTER) and end < len(token_ids):
            texts.append("")
        else:
            texts.append(text[len(before) :])
            before = text
    return texts


def _cost(plm: RemotePlm, demand: Demand, left_out: int, price: float | None) -> Cost:
    cached = cached_distributions(plm)
    tokens = tokens_needed(plm.card, demand, cached)
    shortfalls = list(shortfalls_of(plm.card, plm.rate_limits, demand, cached=cached))
    day = next((quota for quota in plm.rate_limits if quota.name == "day"), None)
    return Cost(
        context=demand.context_mode,
        examples=demand.examples,
        left_out=left_out,
        tokens=tokens,
        share_of_day=tokens / day.quota if day and day.quota else None,
        money=None if price is None else tokens * price / 1e6,
        target_tokens=len(demand.target_ids),
        shortfalls=[f"{each.detail} {each.hint}" for each in shortfalls],
        refused=any(each.is_final for each in shortfalls),
    )

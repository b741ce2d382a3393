"""Durations of the parts of `train` on this machine and this server, estimated from a few steps and small calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from data_owner_client.data.example_retrieval import with_retrieved_examples
from data_owner_client.data.label_tokens import LabelTokenizer, longest_prefixes
from data_owner_client.data.pairs import Pair
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.settings import DEFAULT_DECODING
from data_owner_client.memory.manifest import MemoryPlan
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.training.inputs import Memories, TrainingInput
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.time_budget import WorkCosts

# Prompts with retrieved examples are long, so that a few of them tell the rate.
_RETRIEVED_PROMPTS = 4
# Drafts of a round, and tokens that one brings (docs/results.md, number of drafts).
_LOOK_AHEAD = 2
_TOKENS_PER_ROUND = 2.0


def estimate_costs(
    plm: RemotePlm,
    memories: Memories,
    inputs: TrainingInput,
    settings: TrainingSettings,
    *,
    retrieved_examples: int,
    clock: Callable[[], float],
) -> WorkCosts:
    """Seconds of each kind of work.

    Args:
        plm: the PLM. It sees prompts of held-out texts, as when the memory was built.
        memories: both memories.
        inputs: inputs of the training.
        settings: settings of the training.
        retrieved_examples: examples in each prompt with retrieved examples; 0 if there are to be none.
        clock: seconds of a monotonic clock.

    Raises:
        PemaError: a call to the PLM failed.
    """
    pairs, task, limits = memories.shown_held_out_pairs, memories.plan.task, plm.card.limits
    rows_E = memories.held_out.rows_E
    look_ahead = min(_LOOK_AHEAD, limits.max_look_ahead)
    texts = min(DEFAULT_DECODING.batch_size, limits.max_sequences, limits.max_rows // (1 + look_ahead), len(pairs))
    prompts = _prompts(plm, [task] * texts, pairs[:texts])
    first = _call_seconds(plm, prompts, look_ahead, clock)
    round_seconds = _call_seconds(plm, prompts, look_ahead, clock)  # the server now has their attention states
    tokens = float(rows_E.float().mean())
    rounds = _rounds(plm, memories.plan, tokens)
    # Each round sends all that there is.
    text_tokens = rounds * (sum(map(len, prompts)) / texts + tokens / 2 + look_ahead)
    text = (max(0.0, first - round_seconds) + rounds * round_seconds) / texts
    retrieval = retrieved_text = 0.0
    if retrieved_examples:
        few = pairs[: min(_RETRIEVED_PROMPTS, limits.max_sequences)]
        retriever = memories.retriever(retrieved_examples)
        tasks = with_retrieved_examples(plm, task, [pair.question for pair in few], retriever)
        each = _call_seconds(plm, _prompts(plm, tasks, few), 0, clock) / len(few)
        # Behind such prompts a round is two calls.
        retrieval, retrieved_text = each * len(pairs), each + 2 * text
    return WorkCosts(inputs.estimate_seconds(settings, clock), retrieval, text, retrieved_text, text_tokens)


def _rounds(plm: RemotePlm, plan: MemoryPlan, tokens: float) -> float:
    """Sequences for one text: those that decode an answer of some tokens, or at most those that score its labels.

    Several mixtures have most labels computed: of 42 intents, 26 to 37 sequences a text (SmolLM2 135M).
    """
    if plan.task.kind != "classify":
        return tokens / _TOKENS_PER_ROUND
    return len(longest_prefixes(LabelTokenizer(plm.tokenizer, plan.task.labels).check(plan.task)))


def _prompts(plm: RemotePlm, tasks: Sequence[Task], pairs: Sequence[Pair]) -> list[list[int]]:
    tokenizer = plm.tokenizer
    return [
        tokenizer.encode_prompt(task.prompt(pair.question, tokenizer)) for task, pair in zip(tasks, pairs, strict=True)
    ]


def _call_seconds(
    plm: RemotePlm, prompts: Sequence[Sequence[int]], look_ahead: int, clock: Callable[[], float]
) -> float:
    room = plm.card.limits.max_sequence_tokens
    began = clock()
    plm.decode(prompts, [min(look_ahead, room - len(prompt)) for prompt in prompts])
    return clock() - began

"""Requests of texts whose labels are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_owner_client.data.label_tokens import LabelIds, LabelTokenizer
from data_owner_client.data.pairs import Source
from data_owner_client.data.reading.problems import TextTooLong, text_origin
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.failures import TextFailures
from data_owner_client.decoding.inputs import TextInput
from data_owner_client.plm.remote_plm import RemotePlm


@dataclass(frozen=True)
class LabelRequest:
    """One text whose labels are scored.

    Attributes:
        prompt: token ids behind which the PLM's distribution is taken.
        label_ids: token ids of each label behind this prompt.
        expected_length: SL in tokens; None only without an adapter.
        adapter_prompt: token ids behind which the adapter's representations are taken; None for `prompt`.
    """

    prompt: Sequence[int]
    label_ids: LabelIds
    expected_length: float | None = None
    adapter_prompt: Sequence[int] | None = None

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest sequence that may be sent: the longer prompt, and a label but for its last token."""
        return max(len(self.prompt), len(self.adapter_prompt or ())) + max(map(len, self.label_ids)) - 1


def label_requests(
    plm: RemotePlm, task: Task, sources: Sequence[Source], inputs: Sequence[TextInput], failures: TextFailures
) -> tuple[list[LabelRequest], list[int]]:
    """Requests of the inputs whose longest label fits the server's limit, and the indices of these texts.

    Args:
        plm: the PLM.
        task: a `classify` task whose labels are known.
        sources: all texts.
        inputs: the texts to answer, with their prompts.
        failures: receives the texts that are too long.

    Raises:
        InvalidData: a label cannot be an answer of this task, or the model cannot tell two labels apart.
    """
    tokenizer, limit = plm.tokenizer, plm.card.limits.max_sequence_tokens
    labels = LabelTokenizer(tokenizer, task.labels)
    labels.check(task)
    requests, numbers = list[LabelRequest](), list[int]()
    for each in inputs:
        with failures.caught(each.number):
            ids = tokenizer.encode_prompt(each.prompt)
            adapter_ids = None if each.adapter_prompt is None else tokenizer.encode_prompt(each.adapter_prompt)
            label_ids = labels.behind(task, sources[each.number], each.prompt, ids)
            request = LabelRequest(ids, label_ids, each.expected_length, adapter_ids)
            if request.longest_tokens > limit:
                raise TextTooLong(
                    f"more than {limit} tokens with its prompt and the longest label",
                    hint="Shorten the text or use fewer examples in the task.",
                    origin=text_origin(each.number),
                )
            requests.append(request)
            numbers.append(each.number)
    return requests, numbers

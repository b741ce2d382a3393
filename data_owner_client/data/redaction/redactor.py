"""The redactor: texts, pairs and tasks as the owner of the PLM may see them."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from math import isfinite
from typing import Any

from data_owner_client.data.chat_turns import with_parsed_arguments
from data_owner_client.data.pair_files import PairFile
from data_owner_client.data.pairs import Conversation, Pair
from data_owner_client.data.reading.problems import InvalidText
from data_owner_client.data.redaction.rules import Redaction, left_in_sources
from data_owner_client.data.redaction.surrogates import SurrogateMap
from data_owner_client.data.tasks import Task
from data_owner_client.plm.tokenizer import PlmTokenizer
from data_owner_client.runtime.progress import Reporter
from protocol.errors import InvalidData

# Names of the protocol of conversations and of JSON schemas. As keys they stay, and so do roles and types.
_PROTOCOL = {
    "role",
    "content",
    "reasoning_content",
    "name",
    "tool_calls",
    "tool_call_id",
    "id",
    "type",
    "function",
    "arguments",
    "text",
    "image_url",
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
    "parameters",
    "properties",
    "required",
    "description",
    "enum",
    "items",
    "object",
    "array",
    "string",
    "number",
    "integer",
    "boolean",
    "null",
}
_Conversion = Callable[[str], str]


class Redactor:
    """Replaces the spans that the rules find by surrogates, one of the same length for each character sequence.

    Held-out texts have surrogates of their own. So an adapter is validated with contexts that are as new to it as the
    true words are in use. With the same surrogates, λ comes out too high.

    Args:
        redaction: the rules.
        key: secret key of the surrogates.
        tokenizer: tokenizer of the PLM, whose token boundaries surrogates keep where they can; None for any.

    Attributes:
        redaction: the rules.
        replaced: number of replaced spans so far, by kind; those of tasks do not count.
        left_in_sources: number of spans in sources that were not replaced, as the rules leave sources alone.
    """

    def __init__(self, redaction: Redaction, key: bytes, tokenizer: PlmTokenizer | None = None) -> None:
        self.redaction = redaction
        self.replaced = Counter[str]()
        self.left_in_sources = 0
        self._surrogates = SurrogateMap(key, tokenizer, redaction.terms)
        other_key = hmac.digest(key, b"held out", hashlib.sha256)
        self._held_out_surrogates = SurrogateMap(other_key, tokenizer, redaction.terms)

    def redact(self, text: str, *, held_out: bool = False) -> str:
        """The text with surrogates, as long as before.

        Args:
            text: any text.
            held_out: whether the surrogates are those of held-out texts.

        Raises:
            InvalidData: a finder gives something else than spans.
        """
        surrogates = self._held_out_surrogates if held_out else self._surrogates
        parts, at = list[str](), 0
        for span in self.redaction.spans(text):
            parts += [text[at : span.start], surrogates[text[span.start : span.end]]]
            at = span.end
            self.replaced[span.kind] += 1
        return "".join([*parts, text[at:]])

    @property
    def summary(self) -> str:
        """A line about the replaced spans."""
        counts = ", ".join(f"{count:,} {kind}" for kind, count in self.replaced.most_common())
        texts = "these texts" if self.redaction.sources else "the targets"
        line = f"Replaced by surrogates: {counts}." if counts else f"The rules find nothing to replace in {texts}."
        return f"{line} {left_in_sources(self.left_in_sources)}".rstrip()

    def surrogate(self, span: str) -> str:
        """The surrogate of a span."""
        return self._surrogates[span]

    def redact_pair(self, task: Task, pair: Pair, *, held_out: bool = False) -> Pair:
        """The pair as the owner of the PLM may see it: the target in the form that the adapter learns, redacted.

        Earlier answers of a conversation are redacted as targets are. Sources are redacted if the rules say so. A
        target that is no answer of the task becomes empty; such a pair is refused when it is tokenised.

        Args:
            task: task of the memory.
            pair: a pair with a target.
            held_out: whether the pair is one to validate with.
        """
        redact = partial(self.redact, held_out=held_out)
        try:
            target = redact(task.answer(pair))
        except InvalidText:
            target = ""
        source = redact(pair.source) if self.redaction.sources else pair.source
        self.left_in_sources += self.redaction.count_left(pair)
        return Pair(source, target, pair.origin, conversation=self._conversation(pair.conversation, redact))

    def redact_pairs(
        self, task: Task, pairs: Sequence[Pair], reporter: Reporter, *, held_out: bool = False
    ) -> Sequence[Pair]:
        """All pairs as the owner may see them, in a temporary file; see `redact_pair`.

        Raises:
            InvalidData: the disk is full, or a finder gives something else than spans.
        """

        def redacted() -> Iterator[Pair]:
            with reporter.bar("redacting", len(pairs), "pairs") as bar:
                for pair in pairs:
                    yield self.redact_pair(task, pair, held_out=held_out)
                    bar.advance(1)

        return PairFile.spool(redacted())

    def redact_task(self, task: Task) -> Task:
        """The task with redacted examples.

        Raises:
            InvalidData: the texts of its prompts have spans that the rules redact, or a redacted example is no answer.
        """
        if self.redaction.sources:
            texts = [task.instruction, task.source_label, task.target_label]
            texts += [json.dumps(each, ensure_ascii=False) for each in (task.tools, task.template_arguments) if each]
            if found := next((text for text in texts if self.redaction.spans(text)), None):
                raise InvalidData(
                    f"The task {task.name} has a text that the rules redact: {found!r:.80}.",
                    hint="Write it otherwise, as every prompt shows it, or say `sources = false` in the rules.",
                )
        examples, replaced = [], self.replaced.copy()
        for number, shot in enumerate(task.examples, 1):
            source = self.redact(shot.source) if self.redaction.sources else shot.source
            # As prompts will show it: JSON of `extract` without its escapes.
            redacted = shot.model_copy(update={"source": source, "target": self.redact(task.answer(shot))})
            try:
                task.require_answer(redacted)
            except InvalidData as error:
                raise InvalidData(
                    f"Example {number} of the task {task.name} is no answer once it is redacted: {error.detail}",
                    hint="Give the task an example without anything that the rules redact.",
                ) from error
            examples.append(redacted)
        self.replaced = replaced
        return task.model_copy(update={"examples": tuple(examples)})

    def _conversation(self, conversation: Conversation | None, redact: _Conversion) -> Conversation | None:
        if conversation is None:
            return None
        turns = (
            _converted(with_parsed_arguments(turn), redact)
            if self.redaction.sources or turn["role"] == "assistant"
            else turn
            for turn in conversation.turns
        )
        tools = _converted(conversation.tools, redact) if self.redaction.sources else conversation.tools
        return Conversation(tuple(turns), tools)


def _converted(value: Any, convert: _Conversion) -> Any:
    """The value with all its keys, texts and numbers converted, names of the protocol excepted."""
    if isinstance(value, str):
        return convert(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        converted = convert(json.dumps(value))
        with suppress(ValueError):  # without its minus sign, for example
            if isfinite(number := json.loads(converted)):
                return number
        return converted
    if isinstance(value, dict):
        return {
            key if key in _PROTOCOL else convert(key): each
            if key in ("role", "type") and isinstance(each, str) and each in _PROTOCOL
            else _converted(each, convert)
            for key, each in value.items()
        }
    if isinstance(value, (list, tuple)):
        return type(value)(_converted(each, convert) for each in value)
    return value

"""Pairs of a text or conversation and its answer, and their digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

from data_owner_client.data.reading.problems import InvalidText, Origin, require_unicode
from data_owner_client.runtime.arguments import require_loaded
from protocol.errors import InvalidData

if TYPE_CHECKING:
    from protocol.chat_template import ChatMessage  # which imports torch, and files are read without

_MESSAGE_HINT = 'For example {"role": "user", "content": "…"}.'


@dataclass(frozen=True)
class Conversation:
    """A conversation up to the turn that is answered.

    Attributes:
        turns: messages with `role` and `content`, and whatever else a chat template reads; the last one is answered.
            The assistant's may have `tool_calls` in place of `content`.
        tools: JSON schemas of the tools that it may use; None for none.

    Raises:
        InvalidText: there is no turn, or one without a role or content.
    """

    turns: tuple[ChatMessage, ...]
    tools: tuple[ChatMessage, ...] | None = None

    def __post_init__(self) -> None:
        if not self.turns or not all(map(_is_message, self.turns)):
            raise InvalidText("a conversation without turns that have roles and contents", hint=_MESSAGE_HINT)

    @property
    def is_single_question(self) -> bool:
        """True for one turn of the user, alone or behind a system turn, without tools."""
        return not self.tools and [turn["role"] for turn in self.turns] in (["user"], ["system", "user"])

    @property
    def has_answers(self) -> bool:
        """True if a turn is the assistant's, so that a prompt shows it."""
        return any(turn["role"] == "assistant" for turn in self.turns)


Source = str | Conversation
"""Input of a task: a text, or a conversation."""


def is_single_question(source: Source) -> bool:
    """True for a text, and for a conversation that is one question (`Conversation.is_single_question`)."""
    return isinstance(source, str) or source.is_single_question


def text_of(source: Source) -> str:
    """The text that is answered: the last turn's, behind that of a system turn if there is no other turn."""
    texts = texts_of(source)
    return "\n\n".join(filter(str.strip, texts)) if is_single_question(source) and len(texts) > 1 else texts[-1]


def texts_of(source: Source) -> list[str]:
    """The texts of a source that a prompt shows: the text itself, or those of all turns."""
    return [source] if isinstance(source, str) else [str(turn.get("content") or "") for turn in source.turns]


def source_record(source: Source) -> str | dict[str, Any]:
    """The source as JSON: a text, or the `messages` and `tools` of a conversation."""
    if isinstance(source, str):
        return source
    return {"messages": source.turns} | ({"tools": source.tools} if source.tools else {})


@dataclass(frozen=True)
class Pair:
    """A source and its target.

    Attributes:
        source: the source text. Of a conversation, the text of the turn that is answered, behind a system turn if the
            conversation has no other turn.
        target: the target text; None if there are only sources.
        origin: where the pair was read; None if it comes from no file. Pairs are equal whatever their origins.
        conversation: the conversation up to the source; None where the source stands alone.
        reply: the assistant's message, where it has more than the text in `target`, such as tool calls; else None.
        references: further right answers beside the target.
        group: name that all pairs of one record have in common, such as a conversation; validation takes all or none
            of them. Empty for a pair that is alone.

    Raises:
        InvalidData: a text is no `str`, or cannot be encoded as UTF-8; a message is no JSON; or the reply has no role,
            or neither content nor calls.
    """

    source: str
    target: str | None = None
    origin: Origin | None = field(default=None, compare=False, repr=False)
    conversation: Conversation | None = None
    reply: ChatMessage | None = None
    references: tuple[str, ...] = ()
    group: str = ""

    @property
    def question(self) -> Source:
        """The conversation, or else the source text."""
        return self.conversation or self.source

    def __post_init__(self) -> None:
        require_unicode(self.source, "the source", self.origin)
        if self.target is not None:
            require_unicode(self.target, "the target", self.origin)
        if self.reply is not None and not _is_message(self.reply):
            raise InvalidText("a reply without a role or content", hint=_MESSAGE_HINT, origin=self.origin)
        if self.conversation or self.reply or self.references or self.group:
            _require_json(further_fields(self), self.origin)


def further_fields(pair: Pair) -> dict[str, Any]:
    """The fields of a pair beside its two texts, as JSON; empty for a pair of two texts."""
    fields: dict[str, Any] = {}
    if pair.conversation is not None:
        fields["turns"] = pair.conversation.turns
        if pair.conversation.tools is not None:
            fields["tools"] = pair.conversation.tools
    others = {"reply": pair.reply, "references": pair.references, "group": pair.group}
    return fields | {name: value for name, value in others.items() if value}


def pair_of(record: Mapping[str, Any], origin: Origin | None = None) -> Pair:
    """The pair of a record with its two texts and its `further_fields`.

    Raises:
        KeyError: the record has no source or target.
        InvalidData: a text cannot be encoded as UTF-8.
    """
    conversation = None
    if "turns" in record:
        tools = record.get("tools")
        conversation = Conversation(tuple(record["turns"]), None if tools is None else tuple(tools))
    return Pair(
        record["source"],
        record["target"],
        origin,
        conversation=conversation,
        reply=record.get("reply"),
        references=tuple(record.get("references", ())),
        group=record.get("group", ""),
    )


def list_of_pairs(pairs: Iterable[Pair]) -> Sequence[Pair]:
    """The pairs of one call as a sequence.

    Raises:
        InvalidData: there is a path in their place, or something else than a pair among them.
    """
    require_loaded(pairs, "The list of pairs", "read_pairs(path)")
    if isinstance(pairs, Sequence) and not isinstance(pairs, (list, tuple)):
        return pairs  # a file of pairs, which may be larger than memory
    pairs = list(pairs)
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, Pair):
            raise InvalidData(f"pair {number} is a {type(pair).__name__}.", hint="Give Pair(source, target).")
    return pairs


class PairSelection(Sequence[Pair]):
    """Some pairs of a sequence, which stay where they are.

    Args:
        pairs: the whole sequence.
        index_N: indices of the selected pairs, in ascending order.
    """

    def __init__(self, pairs: Sequence[Pair], index_N: Sequence[int]) -> None:
        self._pairs = pairs
        self._index_N = index_N

    def __len__(self) -> int:
        return len(self._index_N)

    def __iter__(self) -> Iterator[Pair]:
        """Iterate over the selected pairs in one pass over the whole sequence."""
        selected = iter(self._index_N)
        wanted = next(selected, None)
        for number, pair in enumerate(self._pairs):
            if number == wanted:
                yield pair
                wanted = next(selected, None)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | Sequence[Pair]:
        if isinstance(index, slice):
            return PairSelection(self._pairs, self._index_N[index])
        return self._pairs[self._index_N[index]]


def hash_text(text: str) -> int:
    """The first 64 bits of a text's SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def group_name(content: str) -> str:
    """A name for the group of the pairs of one content, in 16 hexadecimal digits."""
    return f"{hash_text(content):016x}"


def digest_pairs(pairs: Iterable[Pair]) -> str:
    """SHA-256 over the pairs, in order."""
    digest = hashlib.sha256()
    for pair in pairs:
        fields = further_fields(pair)
        digest.update(json.dumps([pair.source, pair.target, *([fields] if fields else [])]).encode())
    return digest.hexdigest()


def _is_message(value: object) -> bool:
    if not isinstance(value, Mapping) or "role" not in value:
        return False
    return value.get("content") is not None or (value["role"] == "assistant" and bool(value.get("tool_calls")))


def _require_json(value: object, origin: Origin | None) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidText(
            "half of a surrogate pair in its conversation or references",
            hint="Write the whole character, as Unicode text.",
            origin=origin,
        ) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidText("a message that is no JSON", hint="Give objects with texts.", origin=origin) from error

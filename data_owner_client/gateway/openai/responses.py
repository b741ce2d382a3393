"""Bodies of answers in OpenAI's form."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Usage:
    """Tokens of a request.

    Attributes:
        prompt_tokens: tokens of all prompts.
        completion_tokens: tokens of all answers.
    """

    prompt_tokens: int
    completion_tokens: int

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.prompt_tokens + other.prompt_tokens, self.completion_tokens + other.completion_tokens)

    @property
    def body(self) -> dict[str, int]:
        """The usage as JSON."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


@dataclass(frozen=True)
class Choice:
    """One answer, or a part of one in a stream.

    Attributes:
        index: number of the answer.
        text: its text.
        finish_reason: reason of its end; None while it grows.
        logprobs: log-probabilities in the form of the call; None where they were not asked for.
        pema: the extension; None where it was not asked for.
    """

    index: int
    text: str
    finish_reason: FinishReason | None = None
    logprobs: dict[str, Any] | None = None
    pema: dict[str, Any] | None = None

    def body(self, content: dict[str, Any]) -> dict[str, Any]:
        """The choice as JSON, around its content."""
        body = {"index": self.index, **content, "logprobs": self.logprobs, "finish_reason": self.finish_reason}
        return body if self.pema is None else body | {"pema": self.pema}


@dataclass(frozen=True)
class AnswerHead:
    """The fields that all bodies of one answer have in common.

    Attributes:
        model: name of the model.
        chat: whether the answer is a chat's.
        system_fingerprint: digest of everything beside the request that a text depends on; None for none.
        include_usage: whether a stream ends with its usage.
        id: id of the answer.
        created: time of the answer, in seconds since 1970.
    """

    model: str
    chat: bool
    system_fingerprint: str | None = None
    include_usage: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice], usage: Usage, pema: dict[str, Any] | None = None) -> dict[str, Any]:
        """The whole answer.

        Args:
            choices: all answers.
            usage: tokens of the request.
            pema: the extension of the answer; None where it was not asked for.
        """
        ordered = sorted(choices, key=lambda choice: choice.index)
        kind = "chat.completion" if self.chat else "text_completion"
        body = self._body(kind, [choice.body(self._content(choice)) for choice in ordered])
        return body | {"usage": usage.body} | ({} if pema is None else {"pema": pema})

    def role_chunk(self, index: int) -> dict[str, Any]:
        """The first chunk of a chat's answer, which has the role alone."""
        return self._chunk([Choice(index, "").body({"delta": {"role": "assistant", "content": ""}})])

    def text_chunk(self, choice: Choice) -> dict[str, Any]:
        """A chunk with text. The reason of an end comes in a chunk of its own."""
        return self._chunk([choice.body({"delta": {"content": choice.text}} if self.chat else {"text": choice.text})])

    def finish_chunk(self, index: int, reason: FinishReason, pema: dict[str, Any] | None = None) -> dict[str, Any]:
        """The last chunk of an answer.

        Args:
            index: number of the answer.
            reason: reason of its end.
            pema: the extension of the whole answer, for the last chunk of the last one; else None.
        """
        choice = Choice(index, "", reason)
        body = self._chunk([choice.body({"delta": {}} if self.chat else {"text": ""})])
        return body if pema is None else body | {"pema": pema}

    async def chunks_of(self, choices: Sequence[Choice], usage: Usage) -> AsyncIterator[dict[str, Any]]:
        """The chunks of an answer that is whole already."""
        for choice in choices:
            yield self.text_chunk(replace(choice, finish_reason=None))
            yield self.finish_chunk(choice.index, choice.finish_reason or "stop")
        if self.include_usage:
            yield self.usage_chunk(usage)

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The chunk without choices that ends a stream whose usage was asked for."""
        return self._chunk([]) | {"usage": usage.body}

    def _content(self, choice: Choice) -> dict[str, Any]:
        if self.chat:
            return {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        return {"text": choice.text}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        body = self._body("chat.completion.chunk" if self.chat else "text_completion", choices)
        return body | {"usage": None} if self.include_usage else body

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        body = {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}
        fingerprint = {} if self.system_fingerprint is None else {"system_fingerprint": self.system_fingerprint}
        return body | fingerprint | {"choices": choices}

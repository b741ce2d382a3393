"""Requests as the gateway works with them, free of the wire's form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_owner_client.adapter.types import Schedule
from data_owner_client.data.answer_form import AnswerForm
from data_owner_client.data.pairs import Conversation
from data_owner_client.decoding.settings import DEFAULT_DECODING, SamplingSettings
from data_owner_client.gateway.openai.answer_forms import answer_form, is_text
from data_owner_client.gateway.openai.bodies import ChatCompletionBody, CompletionBody, Message, RequestBody
from data_owner_client.gateway.openai.errors import ApiError
from data_owner_client.gateway.openai.refused_fields import refuse_unsupported

_SEEDS = 2**63


@dataclass(frozen=True)
class PemaOptions:
    """Options of a request beyond OpenAI's API.

    Attributes:
        explain: whether each token comes with the scores of both sides.
        schedule: schedule of λ; None for the adapter's own.
        lambda_max: λ_max; None for the adapter's own.
        length_reward: nats by which the end is less likely; None for the adapter's own.
        prefix: ids of the tokens with which the answer begins.
        prompt_tokens: number of an echoed text's tokens that are its prompt; None where it is not said.
    """

    explain: bool = False
    schedule: Schedule | None = None
    lambda_max: float | None = None
    length_reward: float | None = None
    prefix: tuple[int, ...] = ()
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class GenerationSettings:
    """Settings by which answers are generated and returned.

    Attributes:
        max_tokens: longest answer, in tokens; 0 only to echo a prompt.
        sampling: settings of sampling; None for the most probable tokens.
        stop: texts before which an answer ends.
        n: answers to each prompt.
        logprobs: most probable tokens to list at each position; None for no log-probabilities.
        form: form that the answers are held to; None for free answers.
        stream: whether the answer is sent while it grows.
        include_usage: whether a stream ends with its usage.
        pema: what the request asks for beyond OpenAI's API.
    """

    max_tokens: int = DEFAULT_DECODING.max_new_tokens
    sampling: SamplingSettings | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    form: AnswerForm | None = None
    stream: bool = False
    include_usage: bool = False
    pema: PemaOptions = PemaOptions()


@dataclass(frozen=True)
class ChatRequest:
    """A request for answers to a conversation.

    Attributes:
        model: name of the model; empty for the first of the gateway's.
        conversation: the conversation, which ends with a turn of the user or a tool.
        settings: how the answers are generated.
    """

    model: str
    conversation: Conversation
    settings: GenerationSettings

    @property
    def last_user_text(self) -> str:
        """The last text of the user, which is the source of a task that is no chat; empty if there is none."""
        texts = [turn["content"] for turn in self.conversation.turns if turn["role"] == "user"]
        return str(texts[-1]) if texts else ""

    @property
    def has_other_turns(self) -> bool:
        """True if there is more than one turn of the user, which only chat tasks read."""
        return len(self.conversation.turns) > 1


@dataclass(frozen=True)
class CompletionRequest:
    """A request for continuations of prompts.

    Attributes:
        model: name of the model; empty for the first of the gateway's.
        prompts: the prompts, each a text or its token ids.
        echo: whether each answer begins with its prompt.
        settings: how the answers are generated.
    """

    model: str
    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool
    settings: GenerationSettings


def chat_request(body: ChatCompletionBody) -> ChatRequest:
    """The request of a body.

    Raises:
        ApiError: it cannot be honoured.
    """
    refuse_unsupported(body.model_extra or {}, chat=True, n=body.n)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
    bounds = [each for each in (body.max_tokens, body.max_completion_tokens) if each is not None]
    max_tokens = min(bounds, default=DEFAULT_DECODING.max_new_tokens)
    if max_tokens == 0:
        raise ApiError(400, "max_tokens is 0. It must be ≥ 1.", param="max_tokens")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    turns = tuple(_turn(message, f"messages.{number}") for number, message in enumerate(body.messages))
    if turns[-1]["role"] not in ("user", "tool"):
        raise ApiError(400, "The last message must be the user's or a tool's.", param="messages")
    if turns[-1]["role"] == "user" and not turns[-1]["content"].strip():
        raise ApiError(400, "The last message has no text.", param=f"messages.{len(turns) - 1}.content")
    return ChatRequest(body.model, Conversation(turns), _settings(body, max_tokens, logprobs))


def completion_request(body: CompletionBody) -> CompletionRequest:
    """The request of a body.

    Raises:
        ApiError: it cannot be honoured.
    """
    refuse_unsupported(body.model_extra or {}, chat=False, n=body.n)
    max_tokens = DEFAULT_DECODING.max_new_tokens if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0, and nothing is echoed. It must be ≥ 1.", param="max_tokens")
    logprobs = None if body.logprobs is False else body.logprobs
    return CompletionRequest(body.model, _prompts(body.prompt), body.echo, _settings(body, max_tokens, logprobs))


def _prompts(prompt: str | list[Any]) -> tuple[str | tuple[int, ...], ...]:
    """The prompts, one at least.

    Raises:
        ApiError: there is none, or one is empty.
    """
    several = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    prompts = tuple(tuple(each) if isinstance(each, list) else each for each in several)
    if any(not (each.strip() if isinstance(each, str) else each) for each in prompts):
        raise ApiError(400, "A prompt is empty. Give each at least a word, or a token's id.", param="prompt")
    return prompts


def _turn(message: Message, param: str) -> Mapping[str, Any]:
    """The message as chat templates read it."""
    role = "system" if message.role == "developer" else message.role
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    if content is None and role not in ("assistant", "tool"):
        raise ApiError(400, f"A message of the {role} has no content.", param=f"{param}.content")
    turn: dict[str, Any] = {"role": role, "content": content or ""}
    if role == "assistant" and message.tool_calls:
        turn["tool_calls"] = message.tool_calls
    if role == "tool":
        further = {"tool_call_id": message.tool_call_id, "name": message.name}
        turn |= {name: value for name, value in further.items() if value is not None}
    return turn


def _settings(body: RequestBody, max_tokens: int, logprobs: int | None) -> GenerationSettings:
    pema = body.pema.model_dump()
    return GenerationSettings(
        max_tokens=max_tokens,
        sampling=_sampling(body),
        stop=_stop(body.stop),
        n=body.n,
        logprobs=logprobs,
        form=answer_form(body),
        stream=body.stream,
        include_usage=body.stream_options.include_usage,
        pema=PemaOptions(**{**pema, "prefix": tuple(pema["prefix"])}),
    )


def _sampling(body: RequestBody) -> SamplingSettings | None:
    if body.temperature == 0 and body.n > 1:
        raise ApiError(400, "At temperature 0 all answers are the same. Give a temperature, or n: 1.", param="n")
    if body.temperature == 0 and body.repetition_penalty == 1:
        return None
    return SamplingSettings(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(body.top_k, 0),  # vLLM's −1 means all tokens
        repetition_penalty=body.repetition_penalty,
        seed=body.seed % _SEEDS,
    )


def _stop(stop: str | list[str | None]) -> tuple[str, ...]:
    stops = tuple(each for each in ([stop] if isinstance(stop, str) else stop) if each is not None)
    if "" in stops:
        raise ApiError(400, "A stop is empty text. Leave it out.", param="stop")
    if any(not is_text(each) for each in stops):
        raise ApiError(400, "A stop has half of a surrogate pair. Write the whole character.", param="stop")
    return stops

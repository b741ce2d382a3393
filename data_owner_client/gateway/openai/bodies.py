"""Bodies of requests as they arrive: the fields that work. All others stay in `model_extra`, unchecked."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictInt, ValidationError, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler, WrapValidator
from pydantic_core import PydanticCustomError

from data_owner_client.adapter.types import Schedule

TokenIds = list[Annotated[StrictInt, Ge(0)]]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]


def _explained(kind: str, message: str) -> WrapValidator:
    """A validator with one message for all members of a union."""

    def validate(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError(kind, message) from None

    return WrapValidator(validate)


# Of a value that is nested too deeply, pydantic names the whole path.
JsonObject = Annotated[dict[str, JsonValue], _explained("json", "it must be a JSON object that is not nested deeply")]


class _Body(BaseModel):
    """A JSON object in which null is the same as nothing."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @model_validator(mode="wrap")
    @classmethod
    def _without_nulls(cls, value: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        if isinstance(value, dict):
            value = {key: part for key, part in value.items() if part is not None}
        return handler(value)


class TextPart(_Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[
            str | list[TextPart],
            _explained("content", 'it must be text, or a list of parts {"type": "text", "text": "…"}'),
        ]
        | None
    ) = None
    tool_calls: list[JsonObject] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class StreamOptions(_Body):
    """Options of a stream."""

    include_usage: bool = False


class PemaExtension(_Body):
    """Options of the gateway beyond OpenAI's API."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    explain: bool = False
    schedule: Schedule | None = None
    lambda_max: Annotated[float, Ge(0), Le(1)] | None = None
    length_reward: Annotated[float, Ge(0), Le(20)] | None = None
    prefix: TokenIds = []
    prompt_tokens: Annotated[int, Ge(0)] | None = None


class RequestBody(_Body):
    """Fields that both calls have."""

    model: str = ""
    max_tokens: Annotated[int, Ge(0)] | None = None
    temperature: Annotated[FiniteFloat, Ge(0)] = 0.0
    top_p: Annotated[FiniteFloat, Ge(0), Le(1)] = 1.0
    top_k: Annotated[int, Ge(-1)] = 0
    repetition_penalty: Annotated[FiniteFloat, Ge(1)] = 1.0
    seed: int = 0
    stop: Annotated[str | list[str | None], _explained("stop", "it must be text, or a list of texts")] = []
    n: Annotated[int, Ge(1), Le(128)] = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    response_format: JsonObject | None = None
    guided_choice: list[str] | None = None
    structured_outputs: JsonObject | None = None
    pema: PemaExtension = PemaExtension()


class ChatCompletionBody(RequestBody):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Ge(0)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Ge(0), Le(20)] | None = None


class CompletionBody(RequestBody):
    """Body of `POST /v1/completions`."""

    prompt: Annotated[
        str | list[str] | TokenIds | list[TokenIds],
        _explained("prompt", "it must be text, token ids, or a list of either"),
    ]
    echo: bool = False
    logprobs: (
        Annotated[
            Annotated[StrictInt, Ge(0), Le(20)] | Literal[False],
            _explained("logprobs", "it must be a number of tokens from 0 to 20"),
        ]
        | None
    ) = None

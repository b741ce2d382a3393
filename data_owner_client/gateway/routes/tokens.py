"""`/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM has them.

With these, lm-evaluation-harness needs no tokenizer of its own. The owner sees nothing of these calls, as its
tokenizer runs here.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge
from fastapi import APIRouter, Request
from pydantic import BaseModel

from data_owner_client.gateway.openai.errors import ApiError
from data_owner_client.gateway.special_texts import spelled_prompt, spelled_text
from data_owner_client.gateway.state import Gateway, gateway_of
from protocol.errors import InvalidData, InvalidRequest
from protocol.messages import DEFAULT_TEMPLATE

router = APIRouter(tags=["tokenizer"])


class TokenizeRequest(BaseModel):
    """A text to tokenise, in which special tokens may be spelled out.

    Attributes:
        prompt: the text.
        model: name of a served model; all have one tokenizer.
        add_special_tokens: whether the tokenizer adds its own, such as the start of a sequence.
        return_token_strs: also return the text of each token.
    """

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    """Token ids to turn into text.

    Attributes:
        tokens: the token ids.
        model: name of a served model; all have one tokenizer.
    """

    tokens: list[Annotated[int, Ge(0)]]
    model: str | None = None


class TokenizeResponse(BaseModel):
    """The tokens of a text.

    Attributes:
        count: number of tokens.
        max_model_len: longest sequence of the model, in tokens.
        tokens: the token ids.
        token_strs: text of each token, where the request asked for it.
    """

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(BaseModel):
    """The text of token ids.

    Attributes:
        prompt: the text, with special tokens spelled out.
    """

    prompt: str


@router.post("/tokenize", summary="The tokens of a text")
def tokenize(request: Request, body: TokenizeRequest) -> TokenizeResponse:
    """The tokens of a text.

    Raises:
        ApiError: the text cannot be tokenised.
    """
    gateway = _gateway(request, body.model)
    tokenizer = gateway.plm.tokenizer
    prompt = spelled_prompt(body.prompt, tokenizer, with_special_tokens=body.add_special_tokens is not False)
    try:
        token_ids = tokenizer.encode_prompt(prompt)
    except (InvalidData, InvalidRequest) as error:
        raise ApiError(400, str(error), param="prompt") from error
    return TokenizeResponse(
        count=len(token_ids),
        max_model_len=gateway.plm.card.limits.max_sequence_tokens,
        tokens=token_ids,
        token_strs=[tokenizer.name(token_id) for token_id in token_ids] if body.return_token_strs else None,
    )


@router.post("/detokenize", summary="The text of token ids")
def detokenize(request: Request, body: DetokenizeRequest) -> DetokenizeResponse:
    """The text of token ids.

    Raises:
        ApiError: an id is none of the model's.
    """
    gateway = _gateway(request, body.model)
    vocab_size = gateway.plm.card.vocab_size
    for token_id in body.tokens:
        if token_id >= vocab_size:
            raise ApiError(400, f"The model has {vocab_size:,} tokens, and none with id {token_id}.", param="tokens")
    return DetokenizeResponse(prompt=spelled_text(body.tokens, gateway.plm.tokenizer))


@router.get("/tokenizer_info", summary="Special tokens and chat template")
def tokenizer_info(request: Request) -> dict[str, str | int | None]:
    """The special tokens by role, the chat template and the longest sequence, as in a tokenizer's configuration."""
    plm = gateway_of(request).plm
    return {
        "bos_token": None,
        "eos_token": None,
        **plm.tokenizer.special_tokens,
        "chat_template": plm.tokenizer.chat_templates.get(DEFAULT_TEMPLATE),
        "model_max_length": plm.card.limits.max_sequence_tokens,
        "vocab_size": plm.card.vocab_size,
    }


def _gateway(request: Request, model: str | None) -> Gateway:
    gateway = gateway_of(request)
    if model is not None:
        gateway.models.get(model)  # an unknown name is a mistake, although all models have one tokenizer
    return gateway

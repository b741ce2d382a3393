"""Fields of requests that are refused unless they say what happens anyway. Fields that are not here are ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_owner_client.gateway.openai.errors import ApiError

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"], []),
    "prediction": (),
    "web_search_options": (),
    "suffix": ("",),
    "min_p": (0,),
    "min_tokens": (0,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "guided_json": (),
    "guided_regex": (),
    "guided_grammar": (),
}
_OF_CHAT: dict[str, tuple[Any, ...]] = {"echo": (False,), "add_special_tokens": (False,)}
_OF_COMPLETIONS: dict[str, tuple[Any, ...]] = {"add_special_tokens": (True,)}


def refuse_unsupported(fields: Mapping[str, Any], *, chat: bool, n: int) -> None:
    """Refuse fields that the gateway cannot honour.

    Args:
        fields: the fields that the body does not declare.
        chat: whether the request is a chat's.
        n: number of answers; `best_of` of the same number changes nothing.

    Raises:
        ApiError: there is such a field, and its value would change something.
    """
    rules = {**_NEUTRAL, **(_OF_CHAT if chat else _OF_COMPLETIONS), "best_of": (1, n)}
    for name, value in fields.items():
        if name in rules and value is not None and value not in rules[name]:
            raise ApiError(
                400, f"The gateway does not support {name}. Leave it out.", code="unsupported_parameter", param=name
            )

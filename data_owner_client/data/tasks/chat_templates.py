"""Compiled chat templates of a model."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache

from pydantic import JsonValue

from data_owner_client.plm.tokenizer import PlmTokenizer
from protocol.chat_template import ChatMessage, ChatTemplate, choose_template


def model_template(
    tokenizer: PlmTokenizer,
    name: str | None,
    *,
    tools: Sequence[ChatMessage] | None,
    arguments: Mapping[str, JsonValue],
    day: datetime.date | None,
) -> ChatTemplate:
    """A chat template of the model, one object for equal arguments. Renderings with it share what they find out.

    Args:
        tokenizer: the model's tokenizer.
        name: name of the template; None for the model's default.
        tools: JSON schemas of the tools; None for no tools.
        arguments: further variables of the template.
        day: the day that the template's clock shows; None for the present moment.

    Raises:
        Unsupported: the model has no chat template.
        InvalidData: it has none of this name, or the template cannot be read.
    """
    return _with_tools(tokenizer, name, json.dumps(tools), json.dumps(arguments), day)


@lru_cache(maxsize=64)
def _with_tools(
    tokenizer: PlmTokenizer, name: str | None, tools: str, arguments: str, day: datetime.date | None
) -> ChatTemplate:
    schemas = json.loads(tools)
    return _compiled(tokenizer, name, schemas is not None, arguments, day).with_tools(schemas)


@lru_cache(maxsize=16)
def _compiled(
    tokenizer: PlmTokenizer, name: str | None, with_tools: bool, arguments: str, day: datetime.date | None
) -> ChatTemplate:
    source = choose_template(tokenizer.chat_templates, name, with_tools=with_tools)
    return ChatTemplate(
        source, tokenizer.special_tokens, tokenizer.special_ids, arguments=json.loads(arguments), day=day
    )

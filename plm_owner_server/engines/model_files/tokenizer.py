"""The model's tokenizer, and its form for clients."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from plm_owner_server.engines.model_files.config import unloadable
from protocol.errors import Unsupported
from protocol.messages import TokenizerBundle


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The model's fast tokenizer.

    Raises:
        Unsupported: the folder has no tokenizer that a client could run.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # every tokenizer has errors of its own
        raise unloadable(folder, "tokenizer", error, "Put the model's tokenizer.json into it.") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise Unsupported(
            "The model's tokenizer has no fast form, and clients run no other.",
            hint="Convert it to a tokenizer.json first.",
        )
    return tokenizer


def bundle_tokenizer(tokenizer: PreTrainedTokenizerFast) -> TokenizerBundle:
    """The tokenizer in the form that clients download."""
    tokenizer_json = tokenizer.backend_tokenizer.to_str()
    templates = tokenizer.chat_template or {}  # one text, or texts by name
    named = {"default": templates} if isinstance(templates, str) else dict(templates)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return TokenizerBundle(
        tokenizer_json=tokenizer_json,
        chat_template=named.pop("default", None),
        special_tokens=special,
        named_chat_templates=named,
    )

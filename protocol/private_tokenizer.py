"""Tokenizer files in which no text can spell a special token."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
# Separates the first character of a text that spells a byte piece. After it, the text holds no piece of this form.
_SPLIT_BYTE_PIECES = {
    "type": "Split",
    "pattern": {"Regex": "<(?=0x[0-9A-F]{2}>)"},
    "behavior": "Isolated",
    "invert": False,
}


@dataclass(frozen=True)
class PrivateTokenizer:
    """A tokenizer file whose special tokens have names that nobody can guess.

    Attributes:
        tokenizer_json: the file, for `tokenizers.Tokenizer.from_str`. All ids are those of the original.
        names: the private name of each special token, by its spelling.
        ids: the id of each special token, by its spelling.
        added_ids: ids of the added tokens, special or not.
    """

    tokenizer_json: str
    names: dict[str, str]
    ids: dict[str, int]
    added_ids: frozenset[int]


def make_private(tokenizer_json: str, special_tokens: Iterable[str]) -> PrivateTokenizer:
    """Rename the special tokens of a tokenizer file.

    The special tokens are the added tokens that the file marks as special, `special_tokens`, and the model's unknown
    token. A single character is never one of them: it could not be written otherwise. Added tokens that are not
    special keep their names, because texts spell them.

    `Tokenizer.encode_special_tokens` would not do. Models of the kinds Unigram and WordLevel, and BPE with
    `ignore_merges`, find special tokens in their vocabulary, too; and it would ignore the tokens of a chat template.

    Args:
        tokenizer_json: the original file.
        special_tokens: spellings of tokens with a role, such as the end of a sequence.

    Raises:
        KeyError, TypeError, ValueError: the file is not one of a tokenizer.
    """
    file: dict[str, Any] = json.loads(tokenizer_json)
    model, added = file["model"], file["added_tokens"]
    file["padding"] = file["truncation"] = None
    vocab = _vocab(model)
    by_content = {token["content"]: token for token in added}
    wanted = {*special_tokens, *_unknown_token(model), *(token["content"] for token in added if token["special"])}
    ids = {
        content: by_content[content]["id"] if content in by_content else vocab[content]
        for content in sorted(wanted)
        if len(content) > 1 and (content in by_content or content in vocab)
    }
    nonce = secrets.token_hex(16)
    # The brackets keep names that stand side by side from being one word. No name begins another.
    names = {content: f"<{nonce}{number:06x}>" for number, content in enumerate(ids)}
    for content, token_id in ids.items():
        if content not in by_content:
            by_content[content] = _added_token(token_id)
            added.append(by_content[content])
        # A private name is looked for in the text as it is, before any normaliser runs.
        by_content[content] |= {"content": names[content], "special": True, "normalized": False}
    for token in added:
        if len(token["content"]) == 1:
            token["special"] = False
    added.sort(key=lambda token: token["id"])
    _rename(model, names)
    _unlearn_byte_pieces(file)
    return PrivateTokenizer(json.dumps(file, ensure_ascii=False), names, ids, frozenset(token["id"] for token in added))


def _added_token(token_id: int) -> dict[str, Any]:
    return {"id": token_id, "single_word": False, "lstrip": False, "rstrip": False}


def _vocab(model: dict[str, Any]) -> dict[str, int]:
    """Ids of the model's own tokens; of two pieces with the same text, the later."""
    vocab = model["vocab"]
    return dict(vocab) if isinstance(vocab, dict) else {piece: number for number, (piece, _) in enumerate(vocab)}


def _unknown_token(model: dict[str, Any]) -> Iterator[str]:
    """The token for what no other can say; none if the model has no such token."""
    if model["type"] == "Unigram" and model.get("unk_id") is not None:
        yield model["vocab"][model["unk_id"]][0]
    elif model.get("unk_token") is not None:
        yield model["unk_token"]


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Rename tokens in the model's vocabulary, and drop the merges that would spell them."""
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): token_id for token, token_id in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if model["type"] == "BPE":
        prefix = len(model.get("continuing_subword_prefix") or "")
        unspelled = {*names, *filter(_BYTE_PIECE.fullmatch, model["vocab"])} if model["byte_fallback"] else {*names}
        model["merges"] = [merge for merge in model["merges"] if _keeps(merge, unspelled, prefix)]


def _keeps(merge: str | list[str], unspelled: set[str], prefix: int) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left not in unspelled and right not in unspelled and left + right[prefix:] not in unspelled


def _unlearn_byte_pieces(file: dict[str, Any]) -> None:
    """Keep a text such as `<0x0A>` from being read as a byte: the pieces stand for bytes that no other token has."""
    model = file["model"]
    if not model.get("byte_fallback") or (model["type"] == "BPE" and not model.get("ignore_merges")):
        return
    before = file.get("pre_tokenizer")
    file["pre_tokenizer"] = (
        _SPLIT_BYTE_PIECES if before is None else {"type": "Sequence", "pretokenizers": [before, _SPLIT_BYTE_PIECES]}
    )

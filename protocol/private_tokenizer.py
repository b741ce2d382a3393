"""Tokenizer files in which no text can spell a special token."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Container, Iterable, Iterator
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
class PrivateNames:
    """Names of special tokens that nobody can guess.

    Attributes:
        names: the private name of each special token, by its spelling.
        ids: the id of each special token, by its spelling.
        added_ids: ids of the added tokens, special or not.
    """

    names: dict[str, str]
    ids: dict[str, int]
    added_ids: frozenset[int]


def make_private(
    tokenizer_json: str, special_tokens: Iterable[str], turn_tokens: Container[str] = ()
) -> tuple[str, PrivateNames]:
    """The tokenizer file with private names of its special tokens, and these names. All ids stay the same.

    The special tokens are the added tokens that the file marks as special or that mark turns, `special_tokens`, and
    the model's unknown token. A single character is never one: it could not be written otherwise. Other added tokens
    keep their names, because texts spell them.

    `Tokenizer.encode_special_tokens` would not do. Models of the kinds Unigram and WordLevel, and BPE with
    `ignore_merges`, find special tokens in their vocabulary, too; and it would ignore the tokens of a chat template.

    Args:
        tokenizer_json: the original file, for `tokenizers.Tokenizer.from_str`.
        special_tokens: spellings of tokens with a role, such as the end of a sequence.
        turn_tokens: spellings of tokens that mark turns. The files of some models do not mark them as special.

    Raises:
        KeyError, TypeError, ValueError: the file is not one of a tokenizer.
    """
    file: dict[str, Any] = json.loads(tokenizer_json)
    model, added = file["model"], file["added_tokens"]
    marked = (token["content"] for token in added if token["special"] or token["content"] in turn_tokens)
    ids = _special_ids(model, added, [*special_tokens, *marked])
    nonce = secrets.token_hex(16)
    # The brackets keep names that stand side by side from being one word. No name begins another.
    names = {spelling: f"<{nonce}{number:06x}>" for number, spelling in enumerate(ids)}
    file["added_tokens"] = _privately_added(added, ids, names)
    file["padding"] = file["truncation"] = None
    if "dropout" in model:
        model["dropout"] = None  # the same text always has the same tokens
    _rename(model, names)
    _unlearn_byte_pieces(file)
    added_ids = frozenset(token["id"] for token in file["added_tokens"])
    return json.dumps(file, ensure_ascii=False), PrivateNames(names, ids, added_ids)


def _special_ids(model: dict[str, Any], added: list[dict[str, Any]], special_tokens: Iterable[str]) -> dict[str, int]:
    ids = _vocab(model) | {token["content"]: token["id"] for token in added}
    wanted = {*special_tokens, *_unknown_token(model)}
    return {spelling: ids[spelling] for spelling in sorted(wanted) if len(spelling) > 1 and spelling in ids}


def _privately_added(added: list[dict[str, Any]], ids: dict[str, int], names: dict[str, str]) -> list[dict[str, Any]]:
    """The added tokens, and the special tokens that are not yet among them, with their private names.

    A private name is looked for in the text as it is, before any normaliser runs.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    by_spelling: dict[str, dict[str, Any]] = {spelling: {"id": token_id, **flags} for spelling, token_id in ids.items()}
    by_spelling |= {token["content"]: {**token, "special": False} for token in added}
    for spelling, name in names.items():
        by_spelling[spelling] |= {"content": name, "special": True, "normalized": False}
    return sorted(by_spelling.values(), key=lambda token: token["id"])


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
        pieces = filter(_BYTE_PIECE.fullmatch, model["vocab"]) if model.get("byte_fallback") else ()
        unspelled = {*names, *pieces}
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

"""Schemas with answers that obey them, and token sequences that spell texts, for tests of held decoding."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from data_owner_client.data.stops import Stops
from data_owner_client.plm.tokenizer import PlmTokenizer
from tests.small_tokenizers import KINDS, bundle

HELD_KINDS = ("gpt2", "llama3", "qwen", "roberta", "gemma", "llama", "llama-legacy", "unigram")
"""Tokenizers with all bytes: byte-level BPE, SentencePiece's BPE with byte fallback, and Unigram."""
TOKENIZERS = {kind: PlmTokenizer(bundle(KINDS[kind]())) for kind in HELD_KINDS}

# Tokens that bring an answer to its end, the first first.
_CLOSING = (b"\n", b"}", b"]", b",", b'"', b"0", b"e", b"l", b":", b" ")
_TEXTS = st.text('ab"\\ \n/é€😀{}[]:,\x01\x7f', max_size=4)
_SCALARS = st.none() | st.booleans() | st.integers(-99, 999) | st.sampled_from([0.5, -2.25, 1e-7, 3e22]) | _TEXTS
# What an enumeration cannot have.
_PLAIN_SCALARS = _SCALARS.filter(lambda value: "\x7f" not in str(value) and value not in (1e-7, 3e22))
_NAMES = _TEXTS.map(lambda text: text.replace("\x7f", ""))
_VALUES = st.recursive(
    _PLAIN_SCALARS, lambda part: st.lists(part, max_size=2) | st.dictionaries(_NAMES, part, max_size=2), max_leaves=4
)
SchemaAndAnswer = tuple[dict[str, Any], Any]


def eos_of(tokenizer: PlmTokenizer) -> int:
    """The token that ends a sequence."""
    return tokenizer.special_ids["</s>"]


def stops_of(tokenizer: PlmTokenizer, *texts: str) -> Stops:
    """These stop texts, and the end of a sequence."""
    return Stops(texts, frozenset([eos_of(tokenizer)]))


@st.composite
def _scalars(draw: Callable[..., Any]) -> SchemaAndAnswer:
    answer = draw(_SCALARS)
    kind = {type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string"}[type(answer)]
    schema: dict[str, Any] = {"type": draw(st.sampled_from([kind, [kind, "null"]]))}
    if kind == "integer" and draw(st.booleans()):
        schema |= {"minimum": answer - draw(st.integers(0, 50)), "maximum": answer + draw(st.integers(0, 50))}
    if kind == "string" and draw(st.booleans()):
        schema |= {"minLength": draw(st.integers(0, len(answer))), "maxLength": len(answer) + draw(st.integers(0, 2))}
    return schema, answer


@st.composite
def _enumerations(draw: Callable[..., Any]) -> SchemaAndAnswer:
    values = draw(st.lists(_VALUES, min_size=1, max_size=3))
    return draw(st.sampled_from([{"enum": values}, {"const": values[0]}])), values[0]


@st.composite
def _arrays(draw: Callable[..., Any], part: st.SearchStrategy[SchemaAndAnswer]) -> SchemaAndAnswer:
    items, answer = draw(part)
    repeats = draw(st.integers(0, 2))
    schema = {"type": "array", "items": items, "maxItems": repeats + draw(st.integers(0, 1))}
    return schema | draw(st.sampled_from([{}, {"minItems": repeats}])), [answer] * repeats


@st.composite
def _objects(draw: Callable[..., Any], part: st.SearchStrategy[SchemaAndAnswer]) -> SchemaAndAnswer:
    fields = draw(st.dictionaries(_NAMES, part, max_size=3))
    needed = draw(st.sets(st.sampled_from([*fields]))) if fields else set()
    properties = {name: schema for name, (schema, _) in fields.items()}
    answer = {name: value for name, (_, value) in fields.items() if name in needed or draw(st.booleans())}
    schema = {"type": "object", "properties": properties, "required": [name for name in fields if name in needed]}
    further = draw(st.sampled_from([{}, {"additionalProperties": False}, {"additionalProperties": {"type": "null"}}]))
    if further != {"additionalProperties": False} and "new" not in fields and draw(st.booleans()):
        answer["new"] = None
    return schema | further, answer


SCHEMAS = st.recursive(_scalars() | _enumerations(), lambda part: _arrays(part) | _objects(part), max_leaves=4)
"""A schema, and a value that obeys it with its keys in the schema's order."""


def spell(tokenizer: PlmTokenizer, text: str, seed: int) -> list[int]:
    """Tokens whose texts are the text one after another, some of many such sequences."""
    rest, ids, chosen = text.encode(), list[int](), random.Random(seed)
    tokens = tokenizer.token_bytes
    while rest:
        ids.append(chosen.choice([n for n, token in enumerate(tokens) if token and rest.startswith(token)]))
        rest = rest[len(tokens[ids[-1]] or b"") :]
    return ids


def closing(tokenizer: PlmTokenizer, allowed: list[int]) -> int:
    """The allowed token that seems to bring an answer nearest to its end."""
    eos = eos_of(tokenizer)
    if eos in allowed:
        return eos
    by_text = {tokenizer.token_bytes[token]: token for token in allowed}
    if {b'"', b"#"} <= by_text.keys():  # in a string: nowhere else is this character allowed
        return by_text[b'"']
    return next((by_text[text] for text in _CLOSING if text in by_text), min(allowed))

"""Any text, for tokenizers of all kinds: users' texts are text, and prompt + target is what inference will see."""

from __future__ import annotations

import unicodedata
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data_owner_client.plm.tokenizer import MarkedText, PlmTokenizer, Prompt
from protocol.text_tokenizer import TextTokenizer
from tests.profiles import scaled
from tests.small_tokenizers import KINDS, LOSSLESS, LOSSY, PREFIXED, SPECIAL, SYMBOLS, bundle

pytestmark = pytest.mark.unguarded("no server")

PIECES = [
    *SPECIAL,
    *SYMBOLS,
    *("▁", "▁he", "<0x0A>", "<0xE2>", "<0x", "0A>", "<", "s>", "|>", "mask", "hello", "he", "abb", "b"),
    *(" ", "  ", "\n", "\t", "\u00a0", "e\u0301", "é", "ﬁ", "İ", "👩‍👩‍👧‍👦", "🇩🇪", "\ufdd0", "\ufdd1", "\ufffd", "\0"),
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=8).map("".join)
SPACED = ("llama-legacy", "roberta")
SPELLED = [*SPECIAL, "▁", "<0x"]


@cache
def plain(kind: str) -> Tokenizer:
    return KINDS[kind]()


@cache
def ours(kind: str) -> PlmTokenizer:
    return PlmTokenizer(bundle(plain(kind)))


@cache
def text_tokenizer(kind: str) -> TextTokenizer:
    return TextTokenizer(bundle(plain(kind)))


def has_symbol(text: str) -> bool:
    """True if the text has an added token. Some tokenizers put a space behind each, as if the text had it."""
    return any(symbol in text for symbol in SYMBOLS)


def special_ids(kind: str) -> set[int | None]:
    """Ids that no text may have. The unknown token is what some tokenizers make of an unknown character."""
    unknown = {"<unk>"} if kind in LOSSY else set()
    return {plain(kind).token_to_id(token) for token in {*SPECIAL} - unknown}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=scaled(200))
@given(text=TEXTS)
def test_no_text_has_special_tokens(kind: str, text: str) -> None:
    added = plain(kind).encode("").ids
    ids = ours(kind).encode_prompt(Prompt(text))
    assert [i for i in ids if i in special_ids(kind)] == added


@pytest.mark.parametrize("kind", [*LOSSLESS, *PREFIXED])
@settings(max_examples=scaled(200))
@given(prompt=TEXTS, target=TEXTS)
def test_prompt_and_target_are_decoded_to_what_they_were(kind: str, prompt: str, target: str) -> None:
    assume(prompt)  # an empty one would end before the space that decoding takes away
    assume(kind not in SPACED or not has_symbol(prompt + target))
    tokenizer = ours(kind)
    prompt_ids = tokenizer.encode_prompt(Prompt(prompt))
    target_ids = tokenizer.encode_target(Prompt(prompt), prompt_ids, MarkedText(target))
    # A space goes before a text that has none, and decoding takes one away; not all tokenizers do both.
    start = prompt.removeprefix(" ") if kind in ("llama", "unigram") else prompt
    if kind == "roberta" and not prompt.startswith(" "):
        start = f" {prompt}"
    assert tokenizer.decode(prompt_ids) == start
    assert tokenizer.decode_continuation(target_ids) == target
    assert tokenizer.decode(prompt_ids + target_ids) == start + target


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=scaled(200))
@given(prompt=TEXTS, target=TEXTS)
def test_prompt_and_target_are_the_tokens_of_the_whole_text_where_it_has_that_boundary(
    kind: str, prompt: str, target: str
) -> None:
    tokenizer = ours(kind)
    prompt_ids = tokenizer.encode_prompt(Prompt(prompt))
    target_ids = tokenizer.encode_target(Prompt(prompt), prompt_ids, MarkedText(target))
    whole = tokenizer.encode_prompt(Prompt(prompt + target))
    if whole[: len(prompt_ids)] == prompt_ids:
        assert prompt_ids + target_ids == whole
    else:
        assert target_ids == text_tokenizer(kind).encode_continuation(MarkedText(target))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=scaled(200))
@given(text=TEXTS)
def test_texts_that_spell_no_special_token_have_the_ids_of_the_plain_tokenizer(kind: str, text: str) -> None:
    normalized = unicodedata.normalize("NFKC", text)
    assume(not any(piece in one for piece in SPELLED for one in (text, normalized)))
    encoded = plain(kind).encode(text)
    ids = ours(kind).encode_prompt(Prompt(text))
    assert ids == encoded.ids
    assert ours(kind).decode(ids) == plain(kind).decode(encoded.ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=scaled(200))
@given(parts=st.lists(st.sampled_from(SPECIAL) | TEXTS, max_size=6))
def test_marked_tokens_are_special_and_the_rest_is_not(kind: str, parts: list[str]) -> None:
    marked = MarkedText("")
    for number, part in enumerate(parts):
        special = part in SPECIAL and number % 2 == 0
        marked += MarkedText(part, ((0, len(part)),) if special else ())
    ids = text_tokenizer(kind).encode(marked, with_special_tokens=False)
    spans = [marked.text[start:end] for start, end in marked.special_spans]
    expected = [plain(kind).token_to_id(token) for token in spans]
    assert [i for i in ids if i in special_ids(kind)] == [i for i in expected if i in special_ids(kind)]
    # Where the rest spells nothing, marks change nothing: these are the tokens of the text as a template wrote it.
    rest = "\n".join(part for number, part in enumerate(parts) if part not in SPECIAL or number % 2)
    joined_spells = len([i for i in plain(kind).encode(marked.text, add_special_tokens=False).tokens if i in SPECIAL])
    if joined_spells == len(spans) and not any(piece in unicodedata.normalize("NFKC", rest) for piece in SPELLED):
        assert ids == plain(kind).encode(marked.text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", LOSSY)
@settings(max_examples=scaled(200))
@given(text=TEXTS)
def test_no_text_is_changed_silently(kind: str, text: str) -> None:
    tokenizer = ours(kind)
    change = tokenizer.change(text)
    prompt_ids = tokenizer.encode_prompt(Prompt("the"))
    target_ids = tokenizer.encode_target(Prompt("the"), prompt_ids, MarkedText(text))
    assert tokenizer.decode_continuation(target_ids) == (text if change is None else change)


@settings(max_examples=scaled(200))
@given(text=TEXTS)
def test_a_normaliser_changes_a_text_and_nothing_else_does(text: str) -> None:
    assume(not has_symbol(text))  # they are found before a normaliser could join their ends
    normal = unicodedata.normalize("NFC", text)
    assert ours("qwen").change(text) == (None if normal == text else normal)


@pytest.mark.parametrize("kind", [*LOSSLESS, *PREFIXED])
@settings(max_examples=scaled(200))
@given(text=TEXTS, cut=st.integers(0, 30))
def test_text_that_ends_inside_a_character_is_the_beginning_of_the_text(kind: str, text: str, cut: int) -> None:
    assume(kind not in SPACED or not has_symbol(text))
    ids = text_tokenizer(kind).encode_continuation(MarkedText(text))[:cut]
    assert text.startswith(ours(kind).decode_continuation(ids).rstrip("\ufffd")) or "\ufffd" in text

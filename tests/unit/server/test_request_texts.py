"""Texts of requests are text, and heads without rows for the tokenizer's tokens are found at the start."""

from __future__ import annotations

import logging

import pytest
from tokenizers import AddedToken, Tokenizer

from plm_owner_server.service.request_texts import RequestTexts
from protocol.errors import InvalidRequest, Unsupported
from protocol.marked_text import MarkedText
from tests.small_tokenizers import KINDS, bundle


def texts(tokenizer: Tokenizer, rows: int) -> RequestTexts:
    return RequestTexts(bundle(tokenizer), rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_spells_no_special_token_is_tokenised_as_ever(kind: str) -> None:
    plain = KINDS[kind]()
    text = "hello in the mask"
    assert texts(plain, plain.get_vocab_size()).token_ids(MarkedText(text)) == plain.encode(text).ids


def test_added_tokens_without_a_row_are_told_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    plain = KINDS["gemma"]()
    rows = plain.get_vocab_size()
    with caplog.at_level(logging.WARNING):
        texts(plain, rows)
    assert not caplog.records
    plain.add_tokens([AddedToken("<image>", normalized=False), AddedToken("<sound>", normalized=False)])
    with caplog.at_level(logging.WARNING):
        served = texts(plain, rows)
    assert "2 added tokens of the tokenizer: <image>, <sound>" in caplog.text
    with pytest.raises(InvalidRequest, match=f"no row: it has {rows}"):
        served.token_ids(MarkedText("see <image>"))
    assert served.token_ids(MarkedText("see"))


def test_a_head_without_rows_for_the_models_own_tokens_is_refused() -> None:
    plain = KINDS["gpt2"]()
    highest = max(plain.get_vocab(with_added_tokens=False).values())
    with pytest.raises(Unsupported, match=f"up to id {highest}.* {highest} rows"):
        texts(plain, highest)


def test_a_chat_template_that_leaves_texts_out_is_refused() -> None:
    plain = KINDS["llama"]()
    template = "{% for part in messages[0].content %}{{ part.text }}{% endfor %}"
    with_template = bundle(plain).model_copy(update={"chat_template": template})
    served = RequestTexts(with_template, plain.get_vocab_size())
    with pytest.raises(Unsupported, match="leaves out the text"):
        served.chat_token_ids("hello")


def test_names_show_spaces_and_special_tokens() -> None:
    plain = KINDS["llama"]()
    served = texts(plain, plain.get_vocab_size())
    ids = plain.get_vocab()
    tokens = ["▁hello", "hello", "</s>", "<think>"]
    assert served.names([ids[token] for token in tokens]) == [" hello", *tokens[1:]]

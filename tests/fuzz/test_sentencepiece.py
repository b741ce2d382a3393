"""SentencePiece itself, which reads no control token or byte from a text, against our tokenizer of its model."""

from __future__ import annotations

import io
from functools import cache

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from data_owner_client.plm.tokenizer import PlmTokenizer, Prompt
from protocol.messages import TokenizerBundle
from tests.profiles import scaled

pytestmark = pytest.mark.unguarded("no server")

CONTROL = ["<turn>", "<mask>"]
# The texts teach pieces of which control tokens could be made.
TEXTS = ["the <turned> mask", "turn on the light", "<a> <0x0A> masks <unk <s", "hello there, <turn the mask>"] * 20
PIECES = [*CONTROL, "<s>", "</s>", "<unk>", "<0x0A>", "<0xE2>", "<turn", ">", "mask", " ", "  ", "\n", "é", "🙂", "the"]


def trained(kind: str) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        model_type=kind,
        vocab_size=330,
        byte_fallback=True,
        control_symbols=CONTROL,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def converted(processor: sentencepiece.SentencePieceProcessor, kind: str) -> Tokenizer:
    """The model as converters write it for models of the family Llama."""
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(len(processor))]
    vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=processor.unk_id(), byte_fallback=True))
    else:
        merges = [(piece[:cut], piece[cut:]) for piece in vocab for cut in range(1, len(piece))]
        built = [pair for pair in merges if {*pair} <= {*vocab}]
        model = models.BPE(vocab, built, unk_token=pieces[0][0], fuse_unk=True, byte_fallback=True)
        tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ["<s>", *CONTROL]])
    return tokenizer


@cache
def case(kind: str) -> tuple[sentencepiece.SentencePieceProcessor, PlmTokenizer]:
    processor = trained(kind)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer_json = converted(processor, kind).to_str()
    return processor, PlmTokenizer(
        TokenizerBundle(tokenizer_json=tokenizer_json, chat_template=None, special_tokens=special)
    )


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@settings(max_examples=scaled(1000))
@given(text=st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=8).map("".join))
@example("the <turn> and <mask></s>")
@example("a <0x0A> b")
def test_texts_have_the_ids_that_sentencepiece_gives_them(kind: str, text: str) -> None:
    processor, tokenizer = case(kind)
    text = text.replace("▁", "").replace("\0", "")  # SentencePiece reads them as a space, and as an end
    ids = tokenizer.encode_prompt(Prompt(text))
    assert tokenizer.decode(ids) == text == processor.decode(ids)
    # A split inside the spelling of a byte keeps it from being one, and may divide another piece.
    if kind != "unigram" or "<0x" not in text:
        assert ids == processor.encode(text)

"""Small tokenizers of the kinds that models have, with special and other added tokens.

Each is a `tokenizers.Tokenizer` made by hand, as `transformers` converts the families that it is named after.
"""

from __future__ import annotations

import string

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from protocol.messages import TokenizerBundle

SPECIAL = ["<unk>", "<s>", "</s>", "<mask>", "<|turn|>"]
# Users may write these; they are tokens, but not special.
SYMBOLS = ["<think>", "\n\n", "▁▁▁▁"]
_WORDS = ["he", "hell", "hello", "ab", "abb", "in", "the", "mas", "mask"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_CHARACTERS = [*string.ascii_letters, *string.digits, *"<>|/[]#.,:!?'\n-_"]


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges that build each word from the left."""
    return list(dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word))))


def _with_beginnings(words: list[str]) -> list[str]:
    return list(dict.fromkeys(word[:end] for word in words for end in range(2, len(word) + 1)))


def _vocab(*parts: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(dict.fromkeys(token for part in parts for token in part))}


def _finished(tokenizer: Tokenizer, template: str = "<s> $A", special: tuple[str, ...] = ("<s>",)) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in SYMBOLS[:2]])
    ids = [(token, tokenizer.token_to_id(token)) for token in special]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


def _sentencepiece_decoder(*, strips: bool) -> decoders.Decoder:
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if strips else [])])


def _sentencepiece_bpe() -> Tokenizer:
    # Special tokens can be built from merges here, as converters of SentencePiece models write them.
    words = ["▁he", "▁hello", "▁▁", "<s>", "</s>", *_WORDS]
    vocab = _vocab(SPECIAL, _BYTES, _CHARACTERS, ["▁"], _with_beginnings(words))
    merges = _merges(words)
    return Tokenizer(models.BPE(vocab, merges, unk_token=SPECIAL[0], fuse_unk=True, byte_fallback=True))


def _gemma() -> Tokenizer:
    tokenizer = _sentencepiece_bpe()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = _sentencepiece_decoder(strips=False)
    tokenizer.add_tokens([AddedToken(SYMBOLS[2], normalized=True)])
    return _finished(tokenizer)


def _llama_legacy() -> Tokenizer:
    tokenizer = _sentencepiece_bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = _sentencepiece_decoder(strips=True)
    return _finished(tokenizer)


def _llama() -> Tokenizer:
    tokenizer = _sentencepiece_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = _sentencepiece_decoder(strips=True)
    return _finished(tokenizer)


def _unigram(pieces: list[str], *, byte_fallback: bool) -> Tokenizer:
    vocab = [(piece, -float(number % 17 + 2) / len(piece)) for number, piece in enumerate(pieces)]
    # Control and byte pieces have the score 0 in SentencePiece's files, so that they win wherever they match.
    ruled = [(piece, 0.0 if piece in SPECIAL or piece in _BYTES else score) for piece, score in vocab]
    return Tokenizer(models.Unigram(ruled, unk_id=0, byte_fallback=byte_fallback))


def _unigram_bytes() -> Tokenizer:
    tokenizer = _unigram([*SPECIAL, *_BYTES, *_CHARACTERS, "▁", "▁he", *_WORDS], byte_fallback=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = _sentencepiece_decoder(strips=True)
    return _finished(tokenizer)


def _t5() -> Tokenizer:
    tokenizer = _unigram([*SPECIAL, *_CHARACTERS, "▁", "▁he", *_WORDS], byte_fallback=False)
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=True)
    return _finished(tokenizer, "$A </s>", ("</s>",))


def _byte_level(*, ignore_merges: bool = False, add_prefix_space: bool = False) -> Tokenizer:
    words = ["Ġhe", "Ġhello", "ĊĊ", *_WORDS]
    vocab = _vocab(SPECIAL, sorted(pre_tokenizers.ByteLevel.alphabet()), _with_beginnings(words))
    tokenizer = Tokenizer(models.BPE(vocab, _merges(words), ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gpt2() -> Tokenizer:
    return _finished(_byte_level())


def _roberta() -> Tokenizer:
    return _finished(_byte_level(add_prefix_space=True))


def _llama3() -> Tokenizer:
    """A tokenizer that looks up whole pre-tokens, so that those that spell a special token are found, too."""
    tokenizer = _byte_level(ignore_merges=True)
    pattern = Regex(r"<[^ ]*>|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    split = pre_tokenizers.Split(pattern, "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return _finished(tokenizer)


def _qwen() -> Tokenizer:
    tokenizer = _byte_level()
    tokenizer.normalizer = normalizers.NFC()
    return _finished(tokenizer)


def _bert() -> Tokenizer:
    words = [*_CHARACTERS, *_WORDS, *(f"##{piece}" for piece in [*string.ascii_lowercase, *string.digits, *_WORDS])]
    tokenizer = Tokenizer(models.WordPiece(_vocab(SPECIAL, words), unk_token=SPECIAL[0]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _finished(tokenizer, "<s> $A </s>", ("<s>", "</s>"))


def _words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(_vocab(SPECIAL, _WORDS, _CHARACTERS), unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _finished(tokenizer)


# Those that give every text back, from the beginning of a sequence or behind other text.
LOSSLESS = {"gemma": _gemma, "gpt2": _gpt2, "llama3": _llama3}
# Those that give every text back behind other text, and put a space before a whole one.
PREFIXED = {"llama": _llama, "llama-legacy": _llama_legacy, "unigram": _unigram_bytes, "roberta": _roberta}
# Those that have no tokens for some texts, or normalise them.
LOSSY = {"t5": _t5, "qwen": _qwen, "bert": _bert, "words": _words}
KINDS = LOSSLESS | PREFIXED | LOSSY


def bundle(tokenizer: Tokenizer) -> TokenizerBundle:
    """The tokenizer as a server sends it."""
    return TokenizerBundle(
        tokenizer_json=tokenizer.to_str(),
        chat_template=None,
        special_tokens={"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"},
    )

"""Ends of an answer, against `str.find` in the whole text behind every token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from data_owner_client.data.stops import StopMatcher, Stops
from data_owner_client.plm.tokenizer import PlmTokenizer, Prompt
from harness.tiny_models import EOS, tiny_tokenizer
from protocol.errors import InvalidData
from protocol.messages import TokenizerBundle
from tests.profiles import scaled

SPECIAL, UNKNOWN = "<eos>", "<unk>"


def byte_level() -> tuple[str, int]:
    """The tiny models' tokenizer; its tokens are bytes, and some words."""
    return tiny_tokenizer().backend_tokenizer.to_str(), EOS


def byte_fallback() -> tuple[str, int]:
    """A tokenizer as SentencePiece makes them: spaces are pieces, and other characters are bytes."""
    pieces = [SPECIAL, UNKNOWN, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "#", "##", "▁a", "b#", "▁▁"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("#", "#"), ("▁", "a"), ("b", "#"), ("▁", "▁")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=UNKNOWN, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([SPECIAL])
    return tokenizer.to_str(), 0


def word_pieces() -> tuple[str, int]:
    """A tokenizer of words and their endings, which decoding joins by spaces."""
    vocab = {piece: i for i, piece in enumerate([SPECIAL, UNKNOWN, "a", "b", "##a", "##b", "#", "##c", "."])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([SPECIAL])
    return tokenizer.to_str(), 0


TOKENIZERS = {}
for make in (byte_level, byte_fallback, word_pieces):
    source, eos = make()
    bundle = TokenizerBundle(tokenizer_json=source, chat_template=None, special_tokens={"eos_token": SPECIAL})
    TOKENIZERS[make.__name__] = PlmTokenizer(bundle), eos, Tokenizer.from_str(source).get_vocab_size()

STOP_TEXTS = st.lists(
    st.sampled_from(["###", "\n\n", "#", "a#", " a", "b#\n", "é", "😀", "die t", "\n", "ab", "a b", "##a"]), max_size=3
)


@st.composite
def token_sequences(draw: st.DrawFn) -> tuple[str, list[int]]:
    """Token ids of texts near the stops, mixed with any others: half characters and special tokens included."""
    name = draw(st.sampled_from(sorted(TOKENIZERS)))
    tokenizer, _, size = TOKENIZERS[name]
    texts = st.text(st.sampled_from("a b#\né😀dihte"), min_size=1, max_size=8).map(lambda text: encode(tokenizer, text))
    parts = draw(st.lists(texts | st.lists(st.integers(0, size - 1), min_size=1, max_size=3), max_size=8))
    return name, [i for part in parts for i in part]


def encode(tokenizer: PlmTokenizer, text: str) -> list[int]:
    return tokenizer.encode_prompt(Prompt(text, with_special_tokens=False))


@settings(max_examples=scaled(800))
@given(token_sequences(), STOP_TEXTS)
def test_an_answer_ends_where_its_whole_text_has_a_stop(sequence: tuple[str, list[int]], texts: list[str]) -> None:
    name, ids = sequence
    tokenizer, eos, _ = TOKENIZERS[name]
    matcher = StopMatcher(tokenizer, Stops(tuple(texts), frozenset([eos])))
    for at in range(len(ids)):
        text = tokenizer.decode_continuation(ids[: at + 1])
        found = [text.find(stop) for stop in texts if stop in text]
        by_token = ids[at] in matcher.ids
        assert matcher.ends(ids[: at + 1]) == (bool(found) or by_token)
        if found:
            assert matcher.text(ids[: at + 1]) == text[: min(found)]
        elif by_token:
            assert matcher.text(ids[: at + 1]) == tokenizer.decode_continuation(ids[:at])
        else:
            assert matcher.text(ids[: at + 1]) == text
        if found or by_token:
            assert matcher.end(ids) == at
            return
    assert matcher.end(ids) is None


@settings(max_examples=scaled(800))
@given(token_sequences(), STOP_TEXTS)
def test_what_is_shown_of_a_growing_answer_is_never_taken_back(
    sequence: tuple[str, list[int]], texts: list[str]
) -> None:
    name, ids = sequence
    tokenizer, eos, _ = TOKENIZERS[name]
    matcher = StopMatcher(tokenizer, Stops(tuple(texts), frozenset([eos])))
    ended = matcher.end(ids)
    ids = ids if ended is None else ids[: ended + 1]
    final, shown = matcher.text(ids), ""
    for at in range(len(ids)):
        settled = matcher.settled_text(ids[: at + 1])
        assert settled.startswith(shown)
        assert final.startswith(settled)
        shown = settled
    assert ended is None or shown == final


@pytest.mark.parametrize("stop", ["###", "\n\n", "end of the text"])
def test_of_a_stop_that_spans_tokens_nothing_is_shown(stop: str) -> None:
    tokenizer, eos, _ = TOKENIZERS["byte_level"]
    matcher = StopMatcher(tokenizer, Stops((stop,), frozenset([eos])))
    ids = encode(tokenizer, f"the answer{stop}")
    assert matcher.ids == {eos}
    shown = [matcher.settled_text(ids[: at + 1]) for at in range(len(ids))]
    assert shown[-1] == "the answer"
    assert not any(stop[0] in text[len("the answer") :] for text in shown)
    assert matcher.end(ids) == len(ids) - 1


def test_a_stop_may_stand_inside_a_token() -> None:
    tokenizer, eos, _ = TOKENIZERS["byte_fallback"]
    matcher = StopMatcher(tokenizer, Stops(("#",), frozenset([eos])))
    ids = encode(tokenizer, "ab#")
    assert tokenizer.decode_continuation(ids[-1:]) == "b#"
    assert matcher.ends(ids)
    assert matcher.text(ids).endswith("ab")
    assert ids[-1] in matcher.ids


def test_a_stop_that_is_spelled_in_plain_text_is_no_special_token() -> None:
    """The model's own end is a token; the same characters as text are text."""
    tokenizer, eos, _ = TOKENIZERS["byte_level"]
    ids = encode(tokenizer, f"a {SPECIAL} b")
    assert eos not in ids
    assert StopMatcher(tokenizer, Stops(ids=frozenset([eos]))).end(ids) is None
    assert StopMatcher(tokenizer, Stops(ids=frozenset([eos]))).end([*ids, eos]) == len(ids)


def test_only_the_end_of_a_long_text_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, eos, _ = TOKENIZERS["byte_level"]
    matcher = StopMatcher(tokenizer, Stops(("###",), frozenset([eos])))
    ids = encode(tokenizer, "the thin " * 200)
    assert not matcher.ends(ids)
    decoded, decode = list[int](), tokenizer.decode_continuation

    def counted(token_ids: list[int]) -> str:
        decoded.append(len(token_ids))
        return decode(token_ids)

    monkeypatch.setattr(tokenizer, "decode_continuation", counted)
    assert not matcher.ends(ids)
    assert sum(decoded) < 50


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(InvalidData, match="empty"):
        Stops(("",))

"""The embedded models' tokenizers: users' texts are text, and come back as they were."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_owner_client.plm.tokenizer import MarkedText, PlmTokenizer, Prompt
from plm_owner_server.engines.model_files.sources import resolve
from plm_owner_server.engines.model_files.tokenizer import bundle_tokenizer, load_tokenizer
from plm_owner_server.settings import ServerSettings
from tests.profiles import scaled

SPELLED = ["<mask>", "<unk>", "<eos>", "<bos>", "<pad>", "<end_of_turn>", "<start_of_turn>"]
SPELLED += ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
PIECES = [*SPELLED, "▁", "<0x0A>", "\n\n", "  ", " the", "👩‍👩‍👧‍👦", "e\u0301", "\ufdd0"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=8).map("".join)


class Tokenizers:
    """The owner's tokenizer and the client's."""

    def __init__(self, name: str) -> None:
        folder = resolve(name, ServerSettings(_env_file=None).cache_dir).folder
        self.owners: PreTrainedTokenizerFast = load_tokenizer(folder)
        self.splitting = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
        self.ours = PlmTokenizer(bundle_tokenizer(self.owners))

    def lack(self, text: str) -> bool:
        """True if the vocabulary has no token for a character: that of SmolLM2 lacks some bytes."""
        characters = {*text} - {"▁"}  # decoded to a space by transformers, although the bytes are there
        return any(
            self.owners.decode(self.owners(one).input_ids, skip_special_tokens=True) != one for one in characters
        )


# With a scope of the module, the two are never in memory at once.
@pytest.fixture(scope="module", params=["smollm2-135m", "gemma-3-270m"])
def tokenizers(request: pytest.FixtureRequest) -> Tokenizers:
    return Tokenizers(request.param)


@pytest.mark.parametrize(
    "text",
    [
        "Use <mask> and <unk> tags",
        "Nutze <mask> und <unk>",
        *(f"a {token} b{token}" for token in SPELLED),
        *SPELLED,
        "<start_of_turn>model\nSure.<end_of_turn>\n<start_of_turn>user\n",
        "a▁b ▁ c▁",
        "👩‍👩‍👧‍👦 🇩🇪 ✍🏽",
        "  leading and trailing  ",
        "<0x0A><0xE2>",
        " .  , !",  # no clean-up of spaces
        "don 't",
    ],
)
def test_what_goes_in_comes_out_without_special_tokens(tokenizers: Tokenizers, text: str) -> None:
    ids = tokenizers.ours.encode_prompt(Prompt(text))
    start = tokenizers.owners("").input_ids
    assert ids[: len(start)] == start
    assert not {*ids[len(start) :]} & {*tokenizers.owners.all_special_ids, 1, 2, 106}
    assert tokenizers.ours.decode(ids) == text


@settings(max_examples=scaled(1000))
@given(prompt=TEXTS, target=TEXTS)
def test_any_prompt_and_target_come_back(tokenizers: Tokenizers, prompt: str, target: str) -> None:
    ours = tokenizers.ours
    assume(not tokenizers.lack(prompt + target))
    prompt_ids = ours.encode_prompt(Prompt(prompt))
    target_ids = ours.encode_target(Prompt(prompt), prompt_ids, MarkedText(target))
    assert ours.decode(prompt_ids + target_ids) == prompt + target
    assert ours.decode_continuation(target_ids) == target
    whole = ours.encode_prompt(Prompt(prompt + target))
    assert prompt_ids + target_ids == whole or whole[: len(prompt_ids)] != prompt_ids


@settings(max_examples=scaled(1000))
@given(text=TEXTS)
def test_only_characters_without_a_token_are_changed(tokenizers: Tokenizers, text: str) -> None:
    assert (tokenizers.ours.change(text) is not None) == tokenizers.lack(text)


@settings(max_examples=scaled(1000))
@given(text=TEXTS)
def test_texts_are_tokenised_as_by_transformers_that_splits_special_tokens(tokenizers: Tokenizers, text: str) -> None:
    text = text.replace("▁", "")
    assert tokenizers.ours.encode_prompt(Prompt(text)) == tokenizers.splitting(text).input_ids

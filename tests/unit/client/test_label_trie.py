"""The tree of labels, and its exploration, against the definition over all labels."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.data.label_tokens import LabelTokenizer
from data_owner_client.data.pairs import Conversation, Pair, Source
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.labels.evidence import LabelEvidence
from data_owner_client.decoding.labels.trie import LabelTrie
from data_owner_client.plm.tokenizer import PlmTokenizer
from protocol.errors import InvalidData
from tests import small_tokenizers
from tests.chat_templates import FAMILIES

END = 9
# Few different tokens, so that labels share their beginnings.
LABEL_IDS = st.lists(
    st.lists(st.integers(0, 3), max_size=5).map(lambda ids: (*ids, END)), min_size=1, max_size=12, unique=True
).map(tuple)
PLM = Interpolation(schedule="none")


def names(label_ids: tuple[tuple[int, ...], ...]) -> list[str]:
    return [f"label {number}" for number in range(len(label_ids))]


@given(LABEL_IDS)
def test_paths_spell_the_labels(label_ids: tuple[tuple[int, ...], ...]) -> None:
    trie = LabelTrie.from_ids(names(label_ids), label_ids)
    prefixes = {ids[:length] for ids in label_ids for length in range(len(ids) + 1)}
    assert {tuple(trie.tokens(node)) for node in range(len(trie))} == prefixes
    assert [tuple(trie.tokens(leaf)) for leaf in trie.leaf_L.tolist()] == list(label_ids)
    for node in range(len(trie)):
        prefix = tuple(trie.tokens(node))
        assert trie.depth_N[node] == len(prefix)
        assert trie.labels_N[node] == sum(ids[: len(prefix)] == prefix for ids in label_ids)
        assert sorted(trie.children[node]) == [child for child in range(1, len(trie)) if trie.parent_N[child] == node]


@pytest.mark.parametrize("label_ids", [((1, 2), (1, 2)), ((1,), (1, 2)), ((3, 4, 5), (6,), (3, 4))])
def test_labels_that_cannot_be_told_apart_are_refused(label_ids: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(InvalidData, match="cannot tell the labels"):
        LabelTrie.from_ids(names(label_ids), label_ids)


@given(
    label_ids=LABEL_IDS,
    seed=st.integers(0, 10_000),
    sharpness=st.sampled_from([0.1, 1.0, 5.0, 30.0]),
    tolerance=st.sampled_from([0.0, 1e-12, 1e-4, 0.05, 0.5]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
)
def test_an_explored_tree_is_exact_within_its_tolerance(
    label_ids: tuple[tuple[int, ...], ...], seed: int, sharpness: float, tolerance: float, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    trie = LabelTrie.from_ids(names(label_ids), label_ids)
    # A distribution over the ten tokens behind each node.
    logprob_N_V = (sharpness * torch.randn(len(trie), 10, generator=generator, dtype=torch.float64)).log_softmax(-1)
    logprob_N = logprob_N_V[trie.parent_N, trie.token_N.clamp(min=0)]
    total_L = torch.tensor(
        [
            math.fsum(
                float(logprob_N_V[before, trie.token_N[node]]) for before, node in pairwise([0, *trie.path(leaf)])
            )
            for leaf in trie.leaf_L.tolist()
        ],
        dtype=torch.float64,
    )
    truth_L = (total_L / temperature).softmax(-1)

    evidence = LabelEvidence.empty(trie, [5.0], adapted=False, features=0)
    while (missing_N := evidence.missing(PLM, tolerance, temperature)[0]).any():
        assert not (missing_N & evidence.is_computed_B_N[0]).any()
        assert bool(trie.is_inner_N[missing_N].all())
        evidence.is_computed_B_N[0] |= missing_N
        known_N = evidence.is_computed_B_N[0, trie.parent_N]
        evidence.plm_logprob_B_N[0] = torch.where(known_N, logprob_N, 0.0)
    ours_L = (evidence.label_logprobs(PLM)[0] / temperature).softmax(-1)
    assert float((ours_L - truth_L).abs().max()) <= tolerance + 1e-9
    ordered_L = total_L.sort(descending=True).values
    if len(ordered_L) > 1 and ordered_L[0] - ordered_L[1] > 1e-9:
        assert ours_L.argmax() == total_L.argmax()


PLAIN = Task(name="t", kind="classify", source_label="Text", target_label="Label")
TEXTS = st.text(alphabet="abehilmnost \n.:,Tü", min_size=1, max_size=12)


@pytest.mark.parametrize("kind", small_tokenizers.KINDS)
@given(sources=st.lists(TEXTS, min_size=2, max_size=4), labels=st.lists(TEXTS, min_size=1, max_size=4, unique=True))
def test_labels_have_the_tokens_of_targets_behind_their_prompt(
    kind: str, sources: list[str], labels: list[str]
) -> None:
    assume(not any("\n" in label or not label.strip() for label in labels))
    tokenizer = PlmTokenizer(small_tokenizers.bundle(small_tokenizers.KINDS[kind]()))
    shared = LabelTokenizer(tokenizer, labels)
    for source in sources:
        prompt = PLAIN.prompt(source, tokenizer)
        prompt_ids = tokenizer.encode_prompt(prompt)
        expected = [
            tokenizer.encode_target(prompt, prompt_ids, PLAIN.prompt_and_target(Pair(source, label), tokenizer)[1])
            for label in labels
        ]
        assert list(map(list, shared.behind(PLAIN, source, prompt, prompt_ids))) == expected


@pytest.mark.parametrize(
    "source",
    [
        " spaced ",
        Conversation(({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it spam?"})),
    ],
)
def test_prompts_share_the_tokens_of_labels(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(name="t", kind="classify", format="chat", labels=("spam", "ham"))
    tokenizer = FAMILIES["llama-3"].tokenizer()
    shared = LabelTokenizer(tokenizer, task.labels)
    expected = shared.check(task)
    monkeypatch.setattr(tokenizer, "encode_target", None)
    prompt = task.prompt(source, tokenizer)
    assert shared.behind(task, source, prompt, tokenizer.encode_prompt(prompt)) == expected


@pytest.mark.parametrize(
    ("labels", "words"),
    [([], "no labels"), (["a", " "], "empty"), (["a", "b", "a"], "'a' twice")],
)
def test_lists_of_labels_that_make_no_sense_are_refused(labels: list[str], words: str) -> None:
    tokenizer = PlmTokenizer(small_tokenizers.bundle(small_tokenizers.KINDS["gpt2"]()))
    with pytest.raises(InvalidData, match=words):
        LabelTokenizer(tokenizer, labels)


def test_a_label_that_holds_the_stop_is_named() -> None:
    tokenizer = PlmTokenizer(small_tokenizers.bundle(small_tokenizers.KINDS["gpt2"]()))
    with pytest.raises(InvalidData, match="The label 'two\\\\nlines' cannot be an answer"):
        LabelTokenizer(tokenizer, ["one", "two\nlines"]).check(PLAIN)


def test_labels_that_a_tokenizer_writes_alike_are_named() -> None:
    tokenizer = PlmTokenizer(small_tokenizers.bundle(small_tokenizers.KINDS["bert"]()))  # all letters small
    with pytest.raises(InvalidData, match="'Spam' and 'spam'"):
        LabelTokenizer(tokenizer, ["Spam", "spam"]).check(PLAIN)

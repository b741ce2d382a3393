"""The text most like all others, against plain sums of sacrebleu's own scores."""

from itertools import pairwise

import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from data_owner_client.decoding.mbr import rank_by_expected_chrf

_TEXTS = st.lists(st.text(alphabet="abc d", max_size=8), min_size=1, max_size=6)


@given(_TEXTS, st.booleans())
def test_the_order_is_that_of_mean_chrf(texts: list[str], ended: bool) -> None:
    gains = [sum(sacrebleu.sentence_chrf(text, [other]).score for other in texts) for text in texts]
    order = rank_by_expected_chrf(texts, [ended] * len(texts))
    assert sorted(order) == list(range(len(texts)))
    for better, worse in pairwise(order):
        assert gains[better] >= gains[worse] - 1e-9


def test_what_most_texts_say_wins_and_the_first_of_equals_is_first() -> None:
    assert rank_by_expected_chrf(["Gerät aus", "Das Gerät ist aus", "Gerät aus", "Banane"], [True] * 4)[:2] == [0, 2]
    assert rank_by_expected_chrf(["", "", ""], [True] * 3) == [0, 1, 2]


@given(_TEXTS, _TEXTS)
def test_texts_without_an_end_come_last_and_count_for_nothing(whole: list[str], endless: list[str]) -> None:
    order = rank_by_expected_chrf([*endless, *whole], [False] * len(endless) + [True] * len(whole))
    among_themselves = rank_by_expected_chrf(whole, [True] * len(whole))
    assert order[: len(whole)] == [len(endless) + number for number in among_themselves]

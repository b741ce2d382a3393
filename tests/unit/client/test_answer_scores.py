"""Exact match and F1 of answers, by the published rules of SQuAD's and MLQA's evaluations."""

from __future__ import annotations

import re
import string
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_owner_client.scoring.answers import AnswerScorer
from tests.profiles import scaled


def _squad(answer: str, reference: str) -> tuple[bool, float]:
    """The rules of SQuAD v1.1 for ASCII texts; two answers of no token are equal, as in v2.0."""

    def tokens(text: str) -> list[str]:
        bare = "".join(character for character in text.lower() if character not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", bare).split()

    ours, rights = tokens(answer), tokens(reference)
    if not ours or not rights:
        return ours == rights, float(ours == rights)
    shared = sum((Counter(ours) & Counter(rights)).values())
    precision, recall = shared / len(ours), shared / len(rights)
    return ours == rights, 2 * precision * recall / (precision + recall) if shared else 0.0


@pytest.mark.parametrize(
    ("answer", "references", "language", "exact", "f1"),
    [
        ("The Cat!", ("a cat",), None, True, 100),
        ("in 1999", ("1999", "the year 1999"), "en", False, 200 / 3),
        ("3.5", ("35",), "en", True, 100),
        ("cat cat", ("cat",), "en", False, 200 / 3),
        ("the", ("",), "en", True, 100),
        ("the", ("dog",), "en", False, 0),
        ("der Hund", ("ein Hund",), "de", True, 100),
        ("der Hund", ("Hund",), "de-CH", True, 100),
        ("der Hund", ("Hund",), "en", False, 200 / 3),
        ("„Der Hund“", ("hund",), "de", True, 100),
        ("l’eau de la mer", ("eau de mer",), "fr", True, 100),
        ("l'albero", ("un albero",), "it", True, 100),
        ("los gatos", ("gatos",), "es", True, 100),
        ("het huis", ("een huis",), "nl", True, 100),
        ("os gatos", ("gatos",), "pt_BR", True, 100),
        ("the kissa", ("kissa",), "fi", False, 200 / 3),
        ("北京。", ("北京市",), "zh", False, 200 * 2 / 5),
        ("東京タワー", ("東京",), "ja", False, 200 * 2 / 7),
        ("서울 시", ("서울",), "ko", False, 200 / 3),
    ],
)
def test_answers_compare_without_case_punctuation_and_articles(
    answer: str, references: tuple[str, ...], language: str | None, exact: bool, f1: float
) -> None:
    scorer = AnswerScorer([references], language)
    assert scorer.scores([answer]) == pytest.approx({"exact_match": 100 * exact, "f1": f1})
    assert scorer.each([answer]).tolist() == pytest.approx([f1])


@settings(max_examples=scaled(200))
@given(st.lists(st.tuples(*[st.text(st.sampled_from("a nTthe.-$1 \t"), max_size=12)] * 2), min_size=1, max_size=5))
def test_english_answers_score_as_in_squad(rows: list[tuple[str, str]]) -> None:
    expected = [_squad(answer, reference) for answer, reference in rows]
    scores = AnswerScorer([(reference,) for _, reference in rows]).scores([answer for answer, _ in rows])
    assert scores["exact_match"] == pytest.approx(100 * sum(exact for exact, _ in expected) / len(rows))
    assert scores["f1"] == pytest.approx(100 * sum(f1 for _, f1 in expected) / len(rows))

"""Scorers of every kind of task, against sacrebleu, scikit-learn, rouge-score and properties that must hold."""

from __future__ import annotations

import builtins
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.significance import PairedTest, _compute_p_value
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from data_owner_client.data.pairs import Pair
from data_owner_client.data.tasks import Task
from data_owner_client.scoring.bootstrap import Statistics, mean, micro_f1, paired_p_value
from data_owner_client.scoring.classification import ClassificationScorer
from data_owner_client.scoring.confusion_picture import draw_confusion
from data_owner_client.scoring.rewrite import RewriteScorer
from data_owner_client.scoring.scorer import Scorer
from data_owner_client.scoring.scorers import references_of, scorer_for
from data_owner_client.scoring.summaries import SummaryScorer
from protocol.errors import InvalidData, Unsupported
from tests.profiles import scaled

LABELS = ("lamp", "door", "heating")
KINDS = ("rewrite", "classify", "extract", "answer", "summarise", "chat")
WORDS = st.text(st.sampled_from("abc the fär猫 .,12"), max_size=20)


def _references(kind: str, texts: Sequence[str]) -> list[tuple[str, ...]]:
    """Right answers that a task of this kind may have."""
    if kind == "extract":
        return [(json.dumps({"intent": text, "slots": [text, 1]}),) for text in texts]
    return [(LABELS[len(text) % 3] if kind == "classify" else f"the {text} cat sat here",) for text in texts]


def _scorer(kind: str, references: Sequence[tuple[str, ...]]) -> Scorer:
    return scorer_for(Task.model_validate({"name": "task", "kind": kind}), references)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=scaled(30))
@given(texts=st.lists(WORDS, min_size=1, max_size=6), answers=st.data())
def test_what_every_scorer_promises(kind: str, texts: list[str], answers: Any) -> None:
    references = _references(kind, texts)
    scorer = _scorer(kind, references)
    right = [target for target, *_ in references]
    assert scorer.scores(right) == pytest.approx(dict.fromkeys(scorer.metrics, 100.0))
    assert scorer.each(right) == pytest.approx(torch.full([len(right)], 100.0, dtype=torch.float64))
    given_answers = answers.draw(
        st.lists(WORDS | st.text(max_size=9) | st.sampled_from(right), min_size=len(right), max_size=len(right))
    )
    scores = scorer.scores(given_answers)
    assert set(scores) == set(scorer.metrics)
    assert scorer.headline in scores
    assert all(0 <= score <= 100 + 1e-9 for score in scores.values())
    assert scorer.each(given_answers).dtype == torch.float64
    # Fewer answers are scored against the first references.
    assert scorer.each(given_answers[:1]).tolist() == scorer.each(given_answers)[:1].tolist()
    # The order of texts does not matter.
    turned = _scorer(kind, references[::-1])
    assert turned.scores(given_answers[::-1]) == pytest.approx(scores)


@pytest.mark.parametrize("kind", KINDS)
def test_a_system_does_not_differ_from_itself_but_from_a_far_worse_one(kind: str) -> None:
    references = _references(kind, [f"text {number} of {'x' * number}" for number in range(30)])
    scorer = _scorer(kind, references)
    right = [target for target, *_ in references]
    same, other = scorer.p_values(right, [right, ["nothing"] * len(right)])
    assert same == dict.fromkeys(scorer.metrics, 1.0)
    assert all(p < 0.01 for p in other.values())
    assert set(other) == set(scorer.metrics)
    assert scorer.p_values(right, []) == []


def test_rewrites_have_sacrebleus_scores_and_p_values() -> None:
    references = [f"the {number} quick brown foxes jump over the lazy dog" for number in range(40)]
    near = [text.replace("lazy", "sleepy") if number % 3 else text for number, text in enumerate(references)]
    far = [text.replace("quick brown", "slow") for text in references]
    scorer = RewriteScorer([(text,) for text in references])
    assert scorer.scores(near) == {
        "bleu": sacrebleu.corpus_bleu(near, [references]).score,
        "chrf": sacrebleu.corpus_chrf(near, [references]).score,
    }
    assert scorer.each(far)[3] == sacrebleu.sentence_chrf(far[3], [references[3]]).score
    metrics = {"BLEU": sacrebleu.BLEU(), "chrF2": sacrebleu.CHRF()}
    _, results = PairedTest([("far", far), ("near", near)], metrics, [references], test_type="bs")()
    assert scorer.p_values(far, [near]) == [{"bleu": results["BLEU"][1].p_value, "chrf": results["chrF2"][1].p_value}]


@pytest.mark.parametrize("kind", KINDS)
def test_p_values_without_a_difference_or_a_second_text_are_1(kind: str) -> None:
    texts = ["a", "bb"]
    references = _references(kind, texts)
    two, one = _scorer(kind, references), _scorer(kind, references[:1])
    assert set(two.p_values(["xx", "yy"], [["", "zz"]])[0].values()) == {1.0}  # all have 0
    assert set(one.p_values(["xx"], [[references[0][0]]])[0].values()) == {1.0}


def test_several_references_of_some_texts_score_as_in_sacrebleu() -> None:
    references = [("a small cat sat here", "the cat sat here now"), ("one dog is there today",)]
    answers = ["the cat sat here", "a dog is there today"]
    scorer = RewriteScorer(references)
    streams = [["a small cat sat here", "one dog is there today"], ["the cat sat here now", None]]
    assert scorer.scores(answers)["chrf"] == sacrebleu.CHRF().corpus_score(answers, streams).score
    assert "nrefs:var" in scorer.signatures["chrf"]


@settings(max_examples=scaled(60))
@given(st.lists(st.tuples(*[st.integers(0, 1000)] * 2), min_size=2, max_size=40))
def test_the_p_value_of_means_is_sacrebleus(scores: list[tuple[int, int]]) -> None:
    baseline, system = np.array(scores, np.float64).T
    draws = np.random.default_rng(12345).choice(len(scores), size=(1000, len(scores)), replace=True)
    differences = np.abs(system[draws].mean(1) - baseline[draws].mean(1))
    centred, real = differences - differences.mean(), abs(system.mean() - baseline.mean())
    assume(not np.any(np.isclose(centred, real, rtol=0, atol=1e-6)))  # a tie, which sacrebleu counts as smaller
    assert paired_p_value(mean(baseline), mean(system)) == _compute_p_value(centred, real)


@settings(max_examples=scaled(20))
@given(st.lists(st.tuples(*[st.sampled_from([*LABELS, "other"])] * 3), min_size=1, max_size=12))
def test_resampled_macro_f1_is_that_of_the_resampled_texts(rows: list[tuple[str, str, str]]) -> None:
    truths, first, second = (list(column) for column in zip(*rows, strict=True))
    scorer = ClassificationScorer([(truth,) for truth in truths], LABELS)
    draws = np.random.default_rng(12345).choice(len(rows), size=(1000, len(rows)), replace=True)

    def macro(answers: list[str], drawn: Sequence[int]) -> float:
        rights = [truths[at] for at in drawn]
        return 100 * float(
            f1_score(rights, [answers[at] for at in drawn], labels=sorted({*rights}), average="macro", zero_division=0)
        )

    got = scorer.statistics(first)["macro_f1"]
    weights = np.stack([np.bincount(draw, minlength=len(rows)) for draw in draws[:3]])
    assert got.value(weights @ got.sums_E_F).tolist() == pytest.approx([macro(first, draw) for draw in draws[:3]])
    p_value = scorer.p_values(first, [second])[0]["macro_f1"]
    assert 0 < p_value <= 1
    assert (p_value == 1) >= (first == second)


@settings(max_examples=scaled(60))
@given(st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from([*LABELS, "no label", ""])), min_size=1))
def test_labels_score_as_in_scikit_learn(rows: list[tuple[str, str]]) -> None:
    truths, answers = (list(column) for column in zip(*rows, strict=True))
    scorer = ClassificationScorer([(truth,) for truth in truths], LABELS)
    seen = sorted({*truths})
    assert scorer.scores(answers) == pytest.approx(
        {
            "accuracy": 100 * accuracy_score(truths, answers),
            "macro_f1": 100 * f1_score(truths, answers, labels=seen, average="macro", zero_division=0),
        }
    )
    table = {row.label: row for row in scorer.table(answers)}
    assert [*table] == list(LABELS)
    f1s = f1_score(truths, answers, labels=LABELS, average=None, zero_division=0)
    assert [table[label].f1 for label in LABELS] == pytest.approx((100 * f1s).tolist())
    assert [table[label].count for label in LABELS] == [truths.count(label) for label in LABELS]
    named = [answer if answer in LABELS else "other" for answer in answers]
    counts = confusion_matrix(truths, named, labels=[*LABELS, "other"])
    assert scorer.confusion(answers).counts == counts[:-1].tolist()


def test_labels_of_the_references_join_those_of_the_task() -> None:
    scorer = ClassificationScorer([("window",), ("lamp",), ("door", "gate")], LABELS)
    assert scorer.labels == [*LABELS, "gate", "window"]
    answers = ["lamp", " lamp\n", "gate"]
    assert scorer.each(answers).tolist() == [0, 100, 100]
    assert scorer.scores(answers)["accuracy"] == pytest.approx(200 / 3)


def test_confusions_are_drawn(tmp_path: Path) -> None:
    scorer = ClassificationScorer([("$a",), ("b_{",), ("c",)])
    draw_confusion("costs $5", scorer.confusion(["$a", "c", "nothing"]), tmp_path / "pictures" / "confusion.png")
    assert (tmp_path / "pictures" / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_many_labels_is_small(tmp_path: Path) -> None:
    labels = [f"label {number}" for number in range(300)]
    draw_confusion("many", ClassificationScorer([(label,) for label in labels]).confusion(labels), tmp_path / "a.png")
    height, width, _ = imread(tmp_path / "a.png").shape
    assert max(height, width) < 2000


@settings(max_examples=scaled(100))
@given(st.lists(st.tuples(*[st.text(st.sampled_from("aAbc runing'-_.,3"), max_size=30)] * 2), min_size=1, max_size=4))
def test_english_summaries_score_as_in_rouge_score(rows: list[tuple[str, str]]) -> None:
    rouge = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    expected = [rouge.score(target, answer) for target, answer in rows]
    scores = SummaryScorer([(target,) for target, _ in rows]).scores([answer for _, answer in rows])
    for key in ("rouge1", "rouge2", "rougeL"):
        assert scores[key] == pytest.approx(100 * np.mean([score[key].fmeasure for score in expected]))


def test_rouge_knows_other_scripts() -> None:
    german = SummaryScorer([("Über die Straße gehen",)], "de-AT")
    assert german.scores(["über die straße laufen"])["rouge1"] == pytest.approx(75)
    # Stemming is of English only.
    assert german.scores(["Strassen"])["rouge1"] == SummaryScorer([("running",)], "de").scores(["runs"])["rouge1"] == 0
    assert SummaryScorer([("running",)]).scores(["runs"])["rouge1"] == 100
    assert SummaryScorer([("我爱北京",)], "zh").scores(["我爱上海"])["rouge1"] == pytest.approx(50)
    assert SummaryScorer([("नमस्ते दुनिया",)], "hi").scores(["नमस्ते"])["rouge1"] == pytest.approx(100 * 2 / 3)


def test_summaries_say_which_package_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    import_module = builtins.__import__

    def without_rouge(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("rouge_score"):
            raise ImportError(name)
        return import_module(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rouge)
    with pytest.raises(Unsupported, match=r"pip install -e '.\[client,summaries\]'"):
        SummaryScorer([("a",)])


def test_p_values_of_micro_averages_use_sums() -> None:
    rights = [(1, 1, 1)] * 20
    wrongs = [(0, 1, 1)] * 10 + [(1, 1, 1)] * 10
    assert micro_f1(wrongs).score == 50
    assert paired_p_value(micro_f1(rights), micro_f1(wrongs)) < 0.05
    assert isinstance(micro_f1(rights), Statistics)


def test_references_are_the_target_and_further_answers() -> None:
    assert references_of(Pair("a", "b", references=("c",))) == ("b", "c")
    with pytest.raises(InvalidData, match="no target"):
        references_of(Pair("a"))

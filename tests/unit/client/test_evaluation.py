"""Scores of `evaluate` and tables of `compare`, for every kind of task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from sklearn.metrics import accuracy_score, f1_score

from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.adapter.network import Adapter
from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.cli.score_tables import print_comparison, print_evaluation, print_scores
from data_owner_client.data.pairs import Conversation, Pair
from data_owner_client.data.reading.problems import Origin
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.evaluation.comparison.report import draw, markdown
from data_owner_client.evaluation.comparison.results import Comparison, SystemResult, comparison_rows
from data_owner_client.evaluation.details import ClassificationDetails, ExtractionDetails
from data_owner_client.evaluation.evaluate import Evaluation, evaluate, score_answers
from data_owner_client.evaluation.task_metrics import TaskMetrics
from data_owner_client.memory.tokenized_pairs import tokenize_pair
from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.plm.identity import ModelIdentity
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.scoring.scorers import references_of, scorer_for
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import InvalidData
from tests.adapters import adapter_card

LABELS = ("die Tür", "the", "reden")
WORDS = ["an", "on", "the thin", "shine", "her", "die"]
SOURCES = [f"{word} {number}" for number in range(2) for word in WORDS]
TURNS = ({"role": "user", "content": "an"}, {"role": "assistant", "content": "on"}, {"role": "user", "content": "her"})
SHORT = DecodingSettings(max_new_tokens=6)
SCHEMA = {"type": "object", "properties": {"room": {"enum": ["die", "reden"]}}, "required": ["room"]}


def pairs_with(targets: list[str]) -> list[Pair]:
    return [Pair(source, targets[number % len(targets)]) for number, source in enumerate(SOURCES)]


CASES: dict[str, tuple[Task, list[Pair], list[str]]] = {
    "rewrite": (Task(name="t"), pairs_with(["die Tür", "shine"]), ["BLEU", "chrF"]),
    "classify": (
        Task(name="t", kind="classify", labels=LABELS),
        pairs_with(list(LABELS)),
        ["accuracy", "macro-F1", "precision", "Expected calibration error"],
    ),
    "extract": (
        Task(name="t", kind="extract", answer_schema=SCHEMA),
        pairs_with(['{"room": "die"}', '{"room": "reden"}']),
        ["exact", "valid", "value F1", "Answers by field", "room"],
    ),
    "answer": (Task(name="t", kind="answer"), pairs_with(["the", "die"]), ["exact match", "F1"]),
    "summarise": (Task(name="t", kind="summarise"), pairs_with(["the thin", "die"]), ["ROUGE-L", "chrF"]),
    "chat": (
        Task(name="t", kind="chat"),
        [*pairs_with(["an", "on"]), Pair("her", "an", conversation=Conversation(TURNS))],
        ["chrF", "Side by side"],
    ),
}


@pytest.fixture
def plm(tiny_service: PlmService) -> RemotePlm:
    return RemotePlm(InProcessConnection(tiny_service), cache=None)


def random_adapter(plm: RemotePlm, task: Task, pairs: list[Pair]) -> TrainedAdapter:
    """An adapter with random weights that knows the tokens of the targets."""
    ids_C = torch.tensor(sorted({i for pair in pairs for i in tokenize_pair(plm, task, pair).target}))
    head, D = plm.head_rows(ids_C), plm.card.hidden_size
    torch.manual_seed(2)
    interpolation = Interpolation(schedule="constant", lambda_max=0.9)
    card = adapter_card(ModelIdentity.from_card(plm.card), head, task=task, rank=4, interpolation=interpolation)
    return TrainedAdapter(card, Adapter(D, 4, "residual").eval(), ids_C, head)


@pytest.mark.parametrize("kind", CASES)
def test_every_kind_is_evaluated_by_its_own_metrics(
    plm: RemotePlm, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    task, pairs, words = CASES[kind]
    evaluation = evaluate(plm, pairs, random_adapter(plm, task, pairs), decoding=SHORT, share_targets=True)
    scorer = scorer_for(task, [references_of(pair) for pair in pairs])
    assert evaluation.kind == kind
    assert evaluation.plm == scorer.scores(evaluation.plm_texts)
    assert evaluation.pema == scorer.scores(evaluation.pema_texts)
    assert set(evaluation.p_values) == set(evaluation.metrics) == set(scorer.metrics)
    assert all(0 < p <= 1 for p in evaluation.p_values.values())
    assert evaluation.sources == [pair.source for pair in pairs]
    assert evaluation.targets == [pair.target for pair in pairs]
    assert evaluation.perplexity is not None
    assert evaluation.perplexity.mixture > 1
    assert Evaluation.model_validate_json(evaluation.model_dump_json()) == evaluation
    print_evaluation(evaluation, title="a title")
    shown = capsys.readouterr().out
    for word in (*words, *(metric.title for metric in evaluation.metrics.values()), "a title", "PLM + adapter"):
        assert word in shown


def test_scores_of_labels_are_those_of_scikit_learn(plm: RemotePlm) -> None:
    task, pairs, _ = CASES["classify"]
    evaluation = evaluate(plm, pairs, random_adapter(plm, task, pairs))
    truths = [pair.target for pair in pairs]
    assert evaluation.pema["accuracy"] == pytest.approx(100 * accuracy_score(truths, evaluation.pema_texts))
    macro_f1 = f1_score(truths, evaluation.pema_texts, labels=LABELS, average="macro", zero_division=0)
    assert evaluation.pema["macro_f1"] == pytest.approx(100 * macro_f1)
    details = evaluation.pema_details
    assert isinstance(details, ClassificationDetails)
    assert [row.label for row in details.labels] == list(LABELS)
    counts = torch.tensor(details.confusion.counts)
    assert counts.sum().item() == len(pairs)
    assert 100 * counts.diagonal().sum().item() / len(pairs) == pytest.approx(evaluation.pema["accuracy"])
    assert details.calibration is not None
    assert sum(each.count for each in details.calibration.bins) == len(pairs)


def test_targets_are_tokenised_once(plm: RemotePlm, monkeypatch: pytest.MonkeyPatch) -> None:
    task, pairs, _ = CASES["rewrite"]
    adapter, counted = random_adapter(plm, task, pairs), list[Pair]()

    def tokenize(plm: RemotePlm, task: Task, pair: Pair, shown: Pair | None = None) -> Any:
        counted.append(pair)
        return tokenize_pair(plm, task, pair, shown)

    for module in ("usable_pairs", "tokenized_pairs"):
        monkeypatch.setattr(f"data_owner_client.memory.{module}.tokenize_pair", tokenize)
    left_out = Pair("a", "die\nTür")
    found = evaluate(plm, [*pairs, left_out], adapter, decoding=SHORT, share_targets=True, skip_invalid=True)
    assert counted == [*pairs, left_out]
    assert found.sources == [pair.source for pair in pairs]
    with pytest.raises(InvalidData, match=r"pair 13"):
        evaluate(plm, [*pairs, left_out], adapter, decoding=SHORT, share_targets=True)


def test_answers_of_other_systems_are_scored(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = pairs_with(["die Tür", "shine"])
    answers = [(pair.target or "")[:-1] for pair in pairs]
    scores = score_answers(Task(name="t"), iter(pairs), answers)
    chrf = sacrebleu.corpus_chrf(answers, [[pair.target or "" for pair in pairs]]).score
    assert scores.scores["chrf"] == pytest.approx(chrf)
    print_scores(scores, title="a title")
    assert f"{chrf:.1f}" in capsys.readouterr().out
    task, pairs, _ = CASES["extract"]
    details = score_answers(task, pairs, ['{"room": "die"}'] * len(pairs)).details
    assert isinstance(details, ExtractionDetails)
    assert [(row.field, row.accuracy) for row in details.fields] == [("room", 50.0)]
    with pytest.raises(InvalidData, match="no target"):
        score_answers(task, [Pair("a")], ["b"])


def test_labels_without_texts_are_counted_in_place_of_rows(capsys: pytest.CaptureFixture[str]) -> None:
    task = Task.model_validate(
        {"name": "t", "kind": "classify", "labels": [f"label {number}" for number in range(300)]}
    )
    scores = score_answers(task, [Pair("a", "label 7"), Pair("b", "label 8")], ["label 7", "label 9"])
    assert isinstance(scores.details, ClassificationDetails)
    assert len(scores.details.labels) == 300
    print_scores(scores, title="")
    shown = capsys.readouterr().out
    assert "298 other labels have no text." in shown
    assert "label 7" in shown
    assert "label 10" not in shown


def test_references_that_are_no_answers_of_the_task_are_refused(plm: RemotePlm) -> None:
    task, pairs, _ = CASES["classify"]
    wrong = [*pairs, Pair("a", "no label", Origin("test.jsonl", 7))]
    message = "test.jsonl:7 has a label that the task does not have"
    with pytest.raises(InvalidData, match=message):
        score_answers(task, wrong, ["shine"] * len(wrong))
    adapter = random_adapter(plm, task, pairs)
    with pytest.raises(InvalidData, match=message):
        evaluate(plm, wrong, adapter)
    assert len(evaluate(plm, wrong, adapter, skip_invalid=True).pema_texts) == len(pairs)


@pytest.mark.parametrize("kind", CASES)
def test_every_kind_is_compared_by_its_own_metrics(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, pairs, _ = CASES[kind]
    right = [pair.target or "" for pair in pairs]
    scorer = scorer_for(task, [(text,) for text in right])
    results = [
        SystemResult(name=name, texts=texts)
        for name, texts in (("plm", right[::-1]), ("pema_published", right[1:] + right[:1]), ("best", right))
    ]
    comparison = Comparison(
        **vars(TaskMetrics.of(task, scorer)),
        task="t",
        model="m",
        pairs={"train": 10, "validation": 1, "test": len(pairs)},
        rows=comparison_rows(results, len(pairs), scorer),
    )
    assert Comparison.model_validate_json(comparison.model_dump_json()) == comparison
    assert comparison.rows[-1].scores[comparison.headline] == pytest.approx(100)
    print_comparison(comparison, title="a title")
    shown, table = capsys.readouterr().out, markdown(comparison)
    titles = [metric.title for metric in comparison.metrics.values()]
    headline = comparison.metrics[comparison.headline].title
    for word in (*titles, "against plm", "against pema_published", f" {headline}", "best"):
        assert word in shown
        assert word in table
    assert f"p of the difference in {headline}" in shown
    assert f"p of {headline} against plm |" in table
    assert "against plm_nearest" not in table
    draw(comparison, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(comparison.model_dump_json())["metrics"][comparison.headline]["title"] == headline

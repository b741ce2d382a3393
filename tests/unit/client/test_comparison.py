from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor

from data_owner_client.data.pairs import Conversation, Pair
from data_owner_client.data.tasks import Task
from data_owner_client.evaluation.comparison.compare import compare
from data_owner_client.evaluation.comparison.knn_lm import KnnLm, tune_knn
from data_owner_client.evaluation.comparison.report import draw, markdown
from data_owner_client.evaluation.comparison.results import Comparison, ComparisonRow, SystemResult, comparison_rows
from data_owner_client.evaluation.comparison.runner import ComparisonRunner, Splits
from data_owner_client.evaluation.comparison.systems import SYSTEMS, systems_for
from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter
from data_owner_client.scoring.rewrite import RewriteScorer
from data_owner_client.scoring.scorer import Scorer
from data_owner_client.scoring.scorers import scorer_for
from data_owner_client.training.batches import Batch
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.validation import ValidationData
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import InvalidData
from protocol.head import LMHead

faiss = pytest.importorskip("faiss")  # part of the development environment; a user's may lack it
REFERENCES = [f"Die Tür Nummer {number} ist {word} und bleibt es." for number in range(20) for word in ("zu", "offen")]
SCORER = RewriteScorer([(text,) for text in REFERENCES])
N, D, C = 60, 6, 5


class Listening(Reporter):
    def __init__(self) -> None:
        self.said = list[str]()

    def say(self, line: str) -> None:
        self.said.append(line)


def measured(name: str, texts: list[str]) -> SystemResult:
    return SystemResult(name=name, texts=texts)


def rows_of(*systems: SystemResult, scorer: Scorer = SCORER) -> list[ComparisonRow]:
    return comparison_rows(systems, len(REFERENCES), scorer)


def comparison_of(*systems: SystemResult, task: str = "t") -> Comparison:
    return Comparison(
        task=task,
        kind="rewrite",
        model="m",
        pairs={"train": 1000, "validation": 1, "test": len(REFERENCES)},
        metrics=dict(SCORER.metrics),
        headline=SCORER.headline,
        signatures=SCORER.signatures,
        rows=rows_of(*systems),
    )


def test_significance_is_told_from_chance() -> None:
    near, shifted = (
        [text if number % 10 != wrong else "Das Fenster." for number, text in enumerate(REFERENCES)] for wrong in (0, 5)
    )
    plm, nearest, published, as_good, best = rows_of(
        measured("plm", ["The door is open."] * len(REFERENCES)),
        measured("plm_nearest", ["Die Tür ist offen."] * len(REFERENCES)),
        measured("pema_published", near),
        measured("as_good", shifted),
        measured("best", REFERENCES),
    )
    assert best.scores == pytest.approx({"bleu": 100.0, "chrf": 100.0})
    assert plm.scores["chrf"] < published.scores["chrf"] < best.scores["chrf"]
    assert best.p_values["pema_published"]["chrf"] < 0.05
    assert best.p_values["plm_nearest"]["chrf"] < 0.05
    assert best.p_values["plm"]["bleu"] < 0.05
    assert as_good.p_values["pema_published"]["chrf"] > 0.2
    baselines = {"plm", "plm_nearest", "pema_published"}
    for row in (plm, nearest, published, as_good, best):
        assert set(row.p_values) == baselines - {row.name}


def test_labels_are_compared_by_their_own_metrics() -> None:
    truths = ["on", "off"] * 20
    scorer = scorer_for(Task(name="t", kind="classify"), [(label,) for label in truths])
    plm, best = rows_of(measured("plm", ["on"] * 40), measured("best", truths), scorer=scorer)
    assert plm.scores["accuracy"] == pytest.approx(100 * accuracy_score(truths, ["on"] * 40))
    assert plm.scores["macro_f1"] == pytest.approx(100 * f1_score(truths, ["on"] * 40, average="macro"))
    assert best.p_values["plm"]["accuracy"] < 0.05


def test_without_a_baseline_there_are_no_p_values() -> None:
    (row,) = rows_of(measured("best", REFERENCES))
    assert row.p_values == {}
    assert "p of" not in markdown(comparison_of(measured("best", REFERENCES)))


def test_the_table_names_the_metric_of_p() -> None:
    table = markdown(comparison_of(measured("plm", REFERENCES[::-1]), measured("best", REFERENCES)))
    header = table.splitlines()[2]
    assert "| BLEU | chrF | perplexity | p of chrF against plm | training s |" in header
    assert all(line.count("|") == header.count("|") for line in table.splitlines()[3:6])
    assert SCORER.signatures["chrf"] in table


def test_the_table_tells_nothing_disclosed_from_nothing_said() -> None:
    alone = measured("plm", REFERENCES).model_copy(update={"client_discloses": 0, "owner_discloses": 2_500_000})
    table = markdown(comparison_of(alone, measured("lora", REFERENCES)))
    disclosed = {line.split("**")[1]: line.split("|")[-3:-1] for line in table.splitlines() if "**" in line}
    assert disclosed == {"plm": [" 0.00 ", " 2.5 "], "lora": [" – ", " – "]}


def test_names_with_dollar_signs_can_be_drawn(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    draw(comparison_of(measured("plm", REFERENCES), task="from $x_{ to $y"), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_rows_of_another_test_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="lora has 1 answers to 40 texts"):
        rows_of(measured("lora", ["Ja."]))
    measured("lora", ["Ja."]).save(tmp_path)
    assert SystemResult.load_all(tmp_path) == {"lora": measured("lora", ["Ja."])}
    (tmp_path / "lora.json").write_text("{")
    with pytest.raises(InvalidData, match=r"lora\.json is damaged"):
        SystemResult.load_all(tmp_path)


@pytest.mark.parametrize("changed", ["pairs", "kind", "settings", "older version"])
def test_rows_of_other_work_are_measured_again(tiny_service: PlmService, tmp_path: Path, changed: str) -> None:
    plm = RemotePlm(InProcessConnection(tiny_service), cache=None)
    calls = list[str]()

    def measure(task: Task, pair: Pair, rank: int = 4) -> None:
        splits, settings = Splits([pair], [pair], [pair]), TrainingSettings(rank=rank)
        runner = ComparisonRunner(lambda: plm, plm, task, splits, tmp_path, settings, 8, Reporter())

        def system(_: ComparisonRunner) -> SystemResult:
            calls.append(task.kind)
            return measured("", ["Ja."])

        runner.measure("best", "a system", system, fixed_settings=False)

    task, pair = Task(name="t"), Pair("a", "b")
    measure(task, pair)
    measure(task, pair)
    assert len(calls) == 1
    if changed == "older version":
        measured("best", ["Nein."]).save(tmp_path / "rows")  # has no identity
    measure(
        Task(name="t", kind="answer") if changed == "kind" else task,
        Pair("a", "c") if changed == "pairs" else pair,
        rank=8 if changed == "settings" else 4,
    )
    assert len(calls) == 2
    assert SystemResult.load_all(tmp_path / "rows")["best"].texts == ["Ja."]


def test_rows_of_fixed_settings_stay(tiny_service: PlmService, tmp_path: Path) -> None:
    plm, calls = RemotePlm(InProcessConnection(tiny_service), cache=None), list[int]()
    splits = Splits(*([Pair("a", "b")] for _ in range(3)))
    for rank in (4, 8):
        settings = TrainingSettings(rank=rank)

        def system(runner: ComparisonRunner) -> SystemResult:
            calls.append(runner.settings.rank)
            return measured("", ["Ja."])

        runner = ComparisonRunner(lambda: plm, plm, Task(name="t"), splits, tmp_path, settings, 8, Reporter())
        runner.measure("plm", "a system", system, fixed_settings=True)
    assert calls == [4]


def test_later_answers_alone_are_refused_before_the_first_system(tiny_service: PlmService, tmp_path: Path) -> None:
    plm = RemotePlm(InProcessConnection(tiny_service), cache=None)
    turns = [("user", "an"), ("assistant", "on"), ("user", "her")]
    conversation = Conversation(tuple({"role": role, "content": content} for role, content in turns))
    later = [Pair("her", "an", conversation=conversation)]
    with pytest.raises(InvalidData, match="a file has later ones alone"):
        compare(lambda: plm, Task(name="t", kind="chat"), Splits(later, later, later), tmp_path)
    assert not any(tmp_path.iterdir())


def test_no_system_is_measured_twice() -> None:
    reporter = Listening()
    labels, texts = (Task(name="t", kind=kind) for kind in ("classify", "rewrite"))
    unfit = {"without_length_reward", "most_probable", "beams"}
    assert set(SYSTEMS) - set(systems_for(labels, (), 8, reporter)) == unfit
    assert set(SYSTEMS) - set(systems_for(texts, (), 0, reporter)) == {"most_probable"}
    assert reporter.said == [
        "Left out: without_length_reward is the same as best; most_probable is the same as best; "
        "beams needs free texts, and a task of the kind classify has none.",
        "Left out: most_probable is the same as best.",
    ]
    assert "consensus" not in systems_for(labels, (), 8, reporter)["best"].what
    assert list(systems_for(texts, (), 8, reporter)) == list(SYSTEMS)
    assert list(systems_for(texts, ("best", "plm"), 8, reporter)) == ["plm", "best"]
    for task, consensus in ((labels, 8), (texts, 0)):
        with pytest.raises(InvalidData, match="most_probable is the same as best"):
            systems_for(task, ("most_probable",), consensus, reporter)
    with pytest.raises(InvalidData, match="There is no system gpt"):
        systems_for(texts, ("gpt",), 8, reporter)


def rows(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cr_N_D = torch.randn(N, D, generator=generator)
    return cr_N_D, torch.randint(C, (N,), generator=generator)


def index_of(cr_N_D: Tensor) -> Any:
    index = faiss.IndexFlatL2(D)
    index.add(cr_N_D.numpy())
    return index


@pytest.mark.parametrize("neighbours", [1, 7, N, 10 * N])
def test_knn_lm_is_its_formula(neighbours: int) -> None:
    cr_N_D, label_N = rows(1)
    query_Q_D, temperature = rows(2)[0], 0.8
    knn = KnnLm(None, torch.arange(C), LMHead(torch.zeros(C, D)), index_of(cr_N_D), label_N, neighbours, temperature)  # type: ignore[arg-type]
    for query_D, logprob_C in zip(query_Q_D, knn.logprobs(query_Q_D), strict=True):
        distance_N = (query_D.double() - cr_N_D.double()).square().sum(-1)
        nearest = sorted(range(N), key=lambda i: distance_N[i].item())[:neighbours]
        weight_C = torch.zeros(C, dtype=torch.float64)
        for i in nearest:
            weight_C[label_N[i]] += (-distance_N[i] / temperature).exp()
        torch.testing.assert_close(logprob_C.exp().double(), weight_C / weight_C.sum(), rtol=1e-4, atol=1e-6)


def test_knn_lm_is_tuned_on_what_was_held_out() -> None:
    cr_N_D, label_N = rows(1)
    noisy_N_D = cr_N_D + 0.01 * rows(3)[0]
    before_N_K = torch.full((N, 2), -1)
    validation = ValidationData(
        Batch(noisy_N_D, label_N, before_N_K, torch.ones(N).bool()),
        torch.full((N,), 0.2).log().double(),
        torch.zeros(N),
        torch.ones(N),
    )
    _, _, logprob_N = tune_knn(index_of(cr_N_D), label_N, validation)
    assert logprob_N.exp().mean() > 0.9  # every row's nearest is the one that it was made from
    validation = ValidationData(
        Batch(
            noisy_N_D,
            label_N[torch.randperm(N, generator=torch.Generator().manual_seed(0))],
            before_N_K,
            torch.ones(N).bool(),
        ),
        torch.full((N,), 0.2).log().double(),
        torch.zeros(N),
        torch.ones(N),
    )
    neighbours, _, _ = tune_knn(index_of(cr_N_D), label_N, validation)
    assert neighbours > 4  # where the nearest mislead, more of them do less harm

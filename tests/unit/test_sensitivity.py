"""The sensitivity study: its points, its results on disk, its standard errors, and a point measured end to end."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks.findings import comparisons, sensitivity
from benchmarks.findings.__main__ import with_section
from benchmarks.in_process import served
from benchmarks.sensitivity.measurement import Bench, Measurement, Splits, standard_error
from benchmarks.sensitivity.points import FACTORS, Point, answered_points, effort_points, points
from benchmarks.sensitivity.redaction import a_quarter_of_words
from benchmarks.sensitivity.results import Results
from data_owner_client import Pair, Task
from data_owner_client.evaluation.comparison.results import Comparison, SystemResult, comparison_rows
from data_owner_client.evaluation.task_metrics import TaskMetrics
from data_owner_client.runtime.progress import Reporter
from data_owner_client.scoring.scorers import scorer_for
from data_owner_client.training.validation import LAMBDAS
from harness.tiny_models import TinyModels

MEASUREMENT = Measurement(
    plm_nll=2.0,
    nll={"constant": 1.5, "linear": 1.6, "gradual": 1.7},
    lambda_max={"constant": 0.5, "linear": 0.7, "gradual": 0.9},
    curves={},
    standard_error=0.1,
    rows=10,
    candidates=5,
    coverage=1.0,
    epochs=3,
    seconds=1.0,
)


def test_points_differ_from_the_default_in_one_factor_and_the_seed() -> None:
    default, drawn = asdict(Point(task="spam")), list(points(["spam"], list(FACTORS), 2))
    assert len(drawn) == len(set(drawn))
    for point in drawn:
        changed = {name for name, value in asdict(point).items() if value != default[name]}
        assert len(changed - {"seed"}) <= 1
    for name, values in FACTORS.items():
        assert {*values} <= {getattr(point, name) for point in drawn}


def test_points_of_some_values() -> None:
    drawn = list(points(["spam"], ["context", "kappa"], 1, ["redacted", "0.5"]))
    assert drawn == [Point(task="spam"), Point(task="spam", context="redacted"), Point(task="spam", kappa=0.5)]


def test_texts_are_searched_and_labels_are_not() -> None:
    drawn = list(effort_points(["wordnet-classes", "cwe"]))
    assert [(point.task, point.effort) for point in drawn] == [("cwe", "low"), ("cwe", "medium"), ("cwe", "high")]


def test_a_quarter_of_the_words_is_redacted_and_no_key() -> None:
    words = [f"w{number}" for number in range(4000)]
    text = " ".join(words)
    found = [text[start:end] for start, end, _ in a_quarter_of_words(text)]
    assert len(found) == pytest.approx(1000, rel=0.1)
    secret = found[0]
    frame = json.dumps({secret: f"{secret} and {secret}", "b": [secret]})
    spans = [(start, end) for start, end, _ in a_quarter_of_words(frame)]
    assert all(frame[start:end] == secret for start, end in spans)
    assert [start for start, _ in spans] == [match.start() for match in re.finditer(secret, frame)][1:]


def test_results_survive_an_interruption(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    done, later = Point(task="spam"), Point(task="spam", seed=1)
    Results.load(path).add(done, MEASUREMENT)
    with path.open("a") as file:
        file.write('{"point": {"ta')  # killed while writing
    results = Results.load(path)
    assert done in results
    assert later not in results
    results.add(later, MEASUREMENT)
    again = Results.load(path)
    assert [*again] == [done, later]
    assert again[later] == MEASUREMENT
    assert again[later].gain == 0.5


def test_standard_error_is_that_of_redrawn_texts() -> None:
    generator = torch.Generator().manual_seed(0)
    rows_E = torch.randint(1, 9, (200,), generator=generator)
    # Tokens of one text go together.
    text_N = torch.randn(200, generator=generator).repeat_interleave(rows_E)
    value_N = text_N + torch.randn(len(text_N), generator=generator)
    parts = value_N.split(rows_E.tolist())
    means = []
    for _ in range(2000):
        drawn = torch.randint(200, (200,), generator=generator).tolist()
        means.append(torch.cat([parts[number] for number in drawn]).mean())
    assert standard_error(value_N, rows_E) == pytest.approx(torch.stack(means).std().item(), rel=0.1)


@pytest.mark.slow
def test_a_point_of_each_context_is_measured(tiny_models: TinyModels, tmp_path: Path) -> None:
    pairs = [Pair(f"the {number}", f"die {number % 7}") for number in range(30)]
    splits = Splits(pairs[:20], pairs[20:25], pairs[25:])
    with served(tiny_models["llama"]) as plm:
        bench = Bench(plm, Task(name="tiny"), splits, tmp_path, Reporter())
        for context in FACTORS["context"]:
            measured = bench.measure(Point(task="tiny", context=context, pairs=12, rank=8))
            again = bench.measure(Point(task="tiny", context=context, pairs=12, rank=8))
            assert again.nll == measured.nll
            for schedule, curve in measured.curves.items():
                assert min(curve) <= measured.nll[schedule] <= max(curve)
            assert math.isfinite(measured.standard_error)
            assert 0 < measured.coverage <= 1
        # A new bench finds the memories.
        anew = Bench(plm, Task(name="tiny"), splits, tmp_path, Reporter())
        assert anew.measure(Point(task="tiny", context="by position", pairs=12, rank=8)).nll == pytest.approx(
            measured.nll, rel=1e-6
        )
        answered = anew.measure(Point(task="tiny", pairs=12, rank=8, schedule="constant"))
        assert answered.scores is not None
        assert {*answered.scores} == {"BLEU", "chrF"}
        assert answered.headline == "chrF"
        none = anew.measure(Point(task="tiny", pairs=12, rank=8, schedule="none"))
        assert none.scores != answered.scores
        beams = anew.measure(Point(task="tiny", pairs=12, rank=8, schedule="constant", effort="medium"))
        assert (beams.rows_a_token or 0) > (answered.rows_a_token or math.inf)
        near = anew.measure(Point(task="tiny", pairs=12, rank=8, neighbours=True))
        assert math.isfinite(near.gain)
        assert near.nll != answered.nll


def test_answered_points_are_no_others() -> None:
    drawn = list(answered_points(["spam"]))
    assert len(drawn) == len(set(drawn))
    assert not {*drawn} & {*points(["spam"], list(FACTORS), 3)}
    assert {point.schedule for point in drawn} == {"none", "constant", "linear", "gradual"}


def test_a_section_of_the_page_is_replaced_and_nothing_else() -> None:
    page = "before\n\n<!-- begin a -->\nold \\1\n<!-- end a -->\n\n<!-- begin b -->\nb\n<!-- end b -->\n"
    filled = with_section(page, "a", r"new \2")
    assert filled == page.replace("old \\1", "\nnew \\2\n")
    assert with_section(filled, "a", r"new \2") == filled
    with pytest.raises(ValueError, match="no section"):
        with_section(page, "c", "")


def test_tables_and_pictures_hold_every_point(tmp_path: Path) -> None:
    results = Results.load(tmp_path / "points.jsonl")
    curves = {name: [MEASUREMENT.plm_nll - value for value in LAMBDAS] for name in MEASUREMENT.nll}
    for point in [*points(["spam", "cwe"], list(FACTORS), 2), *answered_points(["spam"])]:
        scores = {"accuracy": 12.3} if point.schedule else None
        nll = MEASUREMENT.nll | {"constant": 1.5 + 0.25 * point.seed}
        changed = {"nll": nll, "curves": curves, "scores": scores, "headline": "accuracy" if scores else ""}
        results.add(point, MEASUREMENT.model_copy(update=changed))
    tables = sensitivity.tables(results)
    for factor, values in FACTORS.items():
        text = tables[f"sensitivity-{factor}"]
        assert text.count("0.375 ± 0.177") >= 2 * len(values)
        names = [("yes" if value else "no") if isinstance(value, bool) else f"{value}" for value in values]
        assert all(name in text for name in names)
    assert "| 12.3 | – |" in tables["sensitivity-answers"]
    pictures = sensitivity.draw(results, tmp_path)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_each_comparison_has_a_row_with_its_headline_metric() -> None:
    task, truths = Task(name="t", kind="classify"), ["on", "off"] * 20
    scorer = scorer_for(task, [(label,) for label in truths])
    wrong = ["off", *truths[1:]]
    systems = {"plm": ["on"] * 40, "plm_nearest": ["on"] * 40, "best": truths, "lora": wrong}
    results = [SystemResult(name=name, texts=texts) for name, texts in systems.items()]
    comparison = Comparison(
        **vars(TaskMetrics.of(task, scorer)),
        task="t",
        model="m",
        pairs={"train": 1, "test": 40},
        rows=comparison_rows(results, 40, scorer),
    )
    tables = comparisons.tables([comparison])
    row = tables["comparison-headlines"].splitlines()[-1]
    start = "| t | classify | accuracy | 50.0 | 50.0 | – | – | – | 100.0 | – | – | 97.5 | – |"
    assert row.startswith(start)
    against_chosen, against_published = (cell.strip() for cell in row.removeprefix(start).strip("|").split("|"))
    assert float(against_chosen) < 0.05
    assert against_published == "–"
    assert "**lora**" in tables["comparison-tables"]

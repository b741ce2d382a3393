from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_owner_client.evaluation.comparison.knn_lm import KnnLm, tune_knn
from data_owner_client.evaluation.comparison.report import markdown
from data_owner_client.evaluation.comparison.results import SystemResult, comparison_rows
from data_owner_client.training.batches import Batch
from data_owner_client.training.validation import ValidationData
from protocol.errors import InvalidData
from protocol.head import LMHead

faiss = pytest.importorskip("faiss")  # part of the development environment; a user's may lack it
REFERENCES = [f"Die Tür Nummer {number} ist {word} und bleibt es." for number in range(20) for word in ("zu", "offen")]
N, D, C = 60, 6, 5


def measured(name: str, texts: list[str]) -> SystemResult:
    return SystemResult(name=name, texts=texts)


def test_significance_is_told_from_chance() -> None:
    near, shifted = (
        [text if number % 10 != wrong else "Das Fenster." for number, text in enumerate(REFERENCES)] for wrong in (0, 5)
    )
    rows = comparison_rows(
        [
            measured("plm", ["The door is open."] * len(REFERENCES)),
            measured("pema_published", near),
            measured("as_good", shifted),
            measured("best", REFERENCES),
        ],
        REFERENCES,
    )
    plm, published, as_good, best = rows
    assert [best.bleu, best.chrf] == pytest.approx([100.0, 100.0])
    assert plm.chrf < published.chrf < best.chrf
    assert (best.p_value_chrf_vs_published or 0.0) < 0.05
    assert (best.p_value_bleu_vs_plm or 0.0) < 0.05
    assert (as_good.p_value_chrf_vs_published or 0.0) > 0.2
    assert published.p_value_chrf_vs_published is None
    assert plm.p_value_chrf_vs_plm is None
    assert None not in (best.p_value_chrf_vs_published, best.p_value_bleu_vs_plm)


def test_without_a_baseline_there_are_no_p_values() -> None:
    (row,) = comparison_rows([measured("best", REFERENCES)], REFERENCES)
    assert row.p_value_chrf_vs_plm is None
    assert row.p_value_bleu_vs_published is None


def test_the_table_tells_nothing_disclosed_from_nothing_said() -> None:
    alone = measured("plm", REFERENCES).model_copy(update={"client_discloses": 0, "owner_discloses": 2_500_000})
    table = markdown("", comparison_rows([alone, measured("lora", REFERENCES)], REFERENCES), [])
    disclosed = {line.split("**")[1]: line.split("|")[-3:-1] for line in table.splitlines() if "**" in line}
    assert disclosed == {"plm": [" 0.00 ", " 2.5 "], "lora": [" – ", " – "]}


def test_rows_of_another_test_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="lora has 1 answers to 40 texts"):
        comparison_rows([measured("lora", ["Ja."])], REFERENCES)
    measured("lora", ["Ja."]).save(tmp_path)
    assert SystemResult.load_all(tmp_path) == {"lora": measured("lora", ["Ja."])}
    (tmp_path / "lora.json").write_text("{")
    with pytest.raises(InvalidData, match=r"lora\.json is damaged"):
        SystemResult.load_all(tmp_path)


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

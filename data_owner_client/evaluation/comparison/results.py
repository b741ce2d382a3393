"""Results of a system, and its row in the comparison with the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from data_owner_client.runtime.atomic_files import write_atomically
from data_owner_client.scoring.settings import BleuTokenizer
from data_owner_client.scoring.text_metrics import text_scores
from protocol.errors import InvalidData

PLM, PUBLISHED, BEST = "plm", "pema_published", "best"
RESAMPLES = 1000


class SystemResult(BaseModel):
    """A system's texts for the test set, and the cost of making the system.

    Attributes:
        name: name of the system, set by the comparison.
        what: description of the system.
        texts: texts of the system, in the order of the test set.
        ppl: perplexity of the references, per token; None if it was not measured.
        train_seconds: duration of training or indexing, without building the memory.
        peak_rss_mb: largest resident memory of the process that trained; None if nothing was trained.
        adapter_bytes: size on the client's disk; None for a system with the model's weights and the texts in one place.
        client_discloses: bytes of the client's texts that the owner sees to build and train; None for a system with the
            model's weights and the texts in one place.
        owner_discloses: bytes of representations and LM-head rows that the client sees; None for a system with the
            model's weights and the texts in one place.
        details: settings that were chosen.
        identity: digest of everything that decides the texts; a row with another one is measured again.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = ""
    what: str = ""
    texts: list[str]
    ppl: float | None = None
    train_seconds: float = 0.0
    peak_rss_mb: float | None = None
    adapter_bytes: int | None = None
    client_discloses: int | None = None
    owner_discloses: int | None = None
    details: dict[str, Any] = {}
    identity: str | None = None

    def save(self, folder: Path) -> None:
        """Write the result into a folder."""
        write_atomically(folder / f"{self.name}.json", self.model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, folder: Path, name: str) -> SystemResult | None:
        """The stored result of a system; None if there is none.

        Raises:
            InvalidData: the file is damaged.
        """
        path = folder / f"{name}.json"
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise InvalidData(f"{path} is damaged.", hint="Delete it and run this again.") from error

    @classmethod
    def load_all(cls, folder: Path) -> dict[str, SystemResult]:
        """All stored results, by name.

        Raises:
            InvalidData: a file is damaged.
        """
        names = [path.stem for path in sorted(folder.glob("*.json"))]
        return {name: result for name in names if (result := cls.load(folder, name)) is not None}


class ComparisonRow(BaseModel):
    """Scores of one system in the comparison, with p-values from paired bootstrap resampling of the test set.

    Fields without a description are those of `SystemResult`.

    Attributes:
        bleu: sacrebleu's BLEU.
        chrf: sacrebleu's chrF2.
        p_value_bleu_vs_plm: p-value of the BLEU difference from the PLM; None for the PLM, or if it was not measured.
        p_value_chrf_vs_plm: p-value of the chrF difference from the PLM; None for the PLM, or if it was not measured.
        p_value_bleu_vs_published: p-value of the BLEU difference from PEMA as published; None for that system, or if it
            was not measured.
        p_value_chrf_vs_published: p-value of the chrF difference from PEMA as published; None for that system, or if it
            was not measured.
    """

    name: str
    what: str
    bleu: float
    chrf: float
    ppl: float | None
    train_seconds: float
    peak_rss_mb: float | None
    adapter_bytes: int | None
    client_discloses: int | None
    owner_discloses: int | None
    p_value_bleu_vs_plm: float | None
    p_value_chrf_vs_plm: float | None
    p_value_bleu_vs_published: float | None
    p_value_chrf_vs_published: float | None
    details: dict[str, Any]


def comparison_rows(
    results: Sequence[SystemResult], references: Sequence[str], tokenizer: BleuTokenizer = "13a"
) -> list[ComparisonRow]:
    """Scores of all systems, with the significance of their differences from the PLM and from PEMA as published.

    Args:
        results: texts of the systems.
        references: references of the texts.
        tokenizer: tokenizer of BLEU.

    Raises:
        InvalidData: a system does not have one text for each reference.
    """
    for result in results:
        if len(result.texts) != len(references):
            raise InvalidData(
                f"{result.name} has {len(result.texts)} answers to {len(references)} texts.",
                hint="It belongs to another test set: delete its row and measure it again.",
            )
    p_values = {base: _p_values(base, results, references, tokenizer) for base in (PLM, PUBLISHED)}
    shared = set(SystemResult.model_fields) & set(ComparisonRow.model_fields)
    rows = []
    for result in results:
        scores = text_scores(result.texts, references, tokenizer)
        against_plm, against_published = (p_values[base].get(result.name, {}) for base in (PLM, PUBLISHED))
        rows.append(
            ComparisonRow(
                **result.model_dump(include=shared),
                bleu=scores.bleu,
                chrf=scores.chrf,
                p_value_bleu_vs_plm=against_plm.get("BLEU"),
                p_value_chrf_vs_plm=against_plm.get("chrF2"),
                p_value_bleu_vs_published=against_published.get("BLEU"),
                p_value_chrf_vs_published=against_published.get("chrF2"),
            )
        )
    return rows


def _p_values(
    baseline: str, results: Sequence[SystemResult], references: Sequence[str], tokenizer: BleuTokenizer
) -> dict[str, dict[str, float | None]]:
    """The p-values of every system's difference from the baseline, by metric; empty without the baseline."""
    import sacrebleu  # slow to import
    from sacrebleu.significance import PairedTest

    systems = sorted(results, key=lambda result: result.name != baseline)
    if not systems or systems[0].name != baseline or len(systems) < 2:
        return {}
    metrics = {
        "BLEU": sacrebleu.BLEU(references=[list(references)], tokenize=tokenizer),
        "chrF2": sacrebleu.CHRF(references=[list(references)]),
    }
    test = PairedTest(
        [(system.name, system.texts) for system in systems],
        metrics,
        references=None,
        test_type="bs",
        n_samples=RESAMPLES,
    )
    _, scores = test()
    return {
        system.name: {metric: scores[metric][index].p_value for metric in metrics}
        for index, system in enumerate(systems)
        if index
    }

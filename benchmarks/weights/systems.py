"""Training and evaluation of the systems on one task, as rows of `pema-client compare`.

All systems learn prompts without in-context examples, with the loss on the target alone. The tuned model is saved and
served by the owner's own service, and it answers as the PLM alone does.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.in_process import perplexity, save_model, served
from benchmarks.weights import full, lora, offsite
from benchmarks.weights.trainee import Outcome, Trainee
from benchmarks.weights.tuning import Tuner, TuningReport, TuningSettings
from data_owner_client import Pair, Task, load_task, read_pairs, translate
from data_owner_client.data.pairs import digest_pairs
from data_owner_client.evaluation.comparison.results import SystemResult
from data_owner_client.memory.build_splits import task_of_memory
from data_owner_client.memory.tokenized_pairs import TokenizedPair, tokenize_pairs
from data_owner_client.runtime.memory_usage import peak_rss_mb

SYSTEMS: dict[str, Callable[[Path], Trainee]] = {
    "lora": lora.prepare,
    "full": full.prepare,
    "offsite": offsite.prepare,
}
_PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Job:
    """A task with its pairs, tokenised for one model.

    Attributes:
        task: the task without in-context examples.
        train: pairs to train on.
        validation: pairs that decide the learning rate and the epoch.
        test: pairs to answer.
        digest: digest of task, pairs and model.
    """

    task: Task
    train: list[TokenizedPair]
    validation: list[TokenizedPair]
    test: list[Pair]
    digest: str

    @classmethod
    def load(cls, data: Path, model: Path, limit: int | None) -> Job:
        """The task and the pairs of a data set's folder.

        Args:
            data: folder with `task.toml`, and `train.jsonl`, `validation.jsonl` and `test.jsonl`.
            model: folder of the PLM.
            limit: number of pairs to train on; None for all.
        """
        pairs = {part: list(read_pairs(data / f"{part}.jsonl")) for part in _PARTS}
        pairs["train"] = pairs["train"][:limit]
        with served(model) as plm:
            task = task_of_memory(load_task(data / "task.toml"), plm.tokenizer, [pairs["train"], pairs["validation"]])
            task = task.model_copy(update={"examples": ()})
            train, validation = (
                tokenize_pairs(plm, [task] * len(pairs[part]), pairs[part], label=f"{part} pair")
                for part in ("train", "validation")
            )
            facts = [plm.card.digest, task.model_dump(mode="json"), [digest_pairs(pairs[part]) for part in _PARTS]]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return cls(task, train, validation, pairs["test"], digest)


def run(system: str, job: Job, model: Path, rows: Path, *, epochs: int) -> None:
    """Train a system and write the rows of its outcomes, unless they are there."""
    identity = hashlib.sha256(json.dumps([system, epochs, job.digest]).encode()).hexdigest()
    if any(row.identity == identity for row in SystemResult.load_all(rows).values()):
        return
    with tempfile.TemporaryDirectory(dir=rows.parent, prefix=f"{system}-") as folder:
        scratch = Path(folder)
        trainee = SYSTEMS[system](model)
        tuner = Tuner(trainee.model, scratch)
        report = tuner.tune(job.train, job.validation, TuningSettings(rates=trainee.rates, epochs=epochs))
        peak = peak_rss_mb()  # before anything is served
        results = []
        for name, outcome in trainee.outcomes.items():
            tuned = scratch / name
            save_model(outcome.model(), model, tuned)
            details = trainee.details | asdict(report)
            results.append(_evaluate(name, outcome, job, tuned, report, peak, details, identity))
        for result in results:
            result.save(rows)


def _evaluate(
    name: str,
    outcome: Outcome,
    job: Job,
    folder: Path,
    report: TuningReport,
    peak_mb: float,
    details: dict[str, object],
    identity: str,
) -> SystemResult:
    with served(folder) as plm:
        return SystemResult(
            name=name,
            what=outcome.what,
            texts=translate(plm, [pair.question for pair in job.test], task=job.task).texts,
            ppl=perplexity(plm, job.task, job.test),
            train_seconds=report.seconds,
            peak_rss_mb=peak_mb,
            client_discloses=outcome.client_discloses,
            owner_discloses=outcome.owner_discloses,
            details=details,
            identity=identity,
        )

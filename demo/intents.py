"""The second demo: intents and slots of sentences as JSON (`python -m demo.intents`, or `make demo-intents`).

From 1,000 sentences, each with its frame, it compares the PLM with the same worked examples, the PLM with examples that
are chosen for each sentence, PEMA from a private memory, and PEMA from a memory whose frames were shared with the PLM's
owner. The answers of all four are held to the same JSON schema. Finished steps are reused.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from data_owner_client import load_task, read_pairs
from data_owner_client.data.pairs import Pair
from data_owner_client.data.tasks import Task
from data_owner_client.runtime.console import print_table
from data_owner_client.scoring.extraction import ExtractionScorer
from data_owner_client.scoring.scorers import references_of
from demo.intents_picture import draw
from demo.steps import Client, console, machine, owner_server, stop_servers_on_termination, tenant_key, write_report
from harness.datasets import intents
from harness.processes import free_port
from protocol import standard_streams

_VALIDATION, _TEST = 120, 200
_EXAMPLES_SHOWN = 6
_RETRIEVED = 4
# Quick settings; `pema-client compare` uses all that `train` can choose by itself.
_TRAINING = ["--minutes", 3, "--no-gate", "--no-search", "--selection-texts", 40]


@dataclass(frozen=True)
class System:
    """A system that the demo measures.

    Attributes:
        title: name in tables and pictures.
        shown: texts that it shows to the PLM's owner.
    """

    title: str
    shown: str


SYSTEMS: Mapping[str, System] = {
    "plm": System("PLM, same examples", "the sentence"),
    "plm_with_examples": System("PLM, examples chosen for each text", "sentences and frames of the chosen examples"),
    "private": System("PEMA, private", "all sentences, and which tokens occur in the frames"),
    "shared": System("PEMA, shared targets", "all sentences and frames"),
}
_BASELINE = "plm_with_examples"


def main() -> None:
    """Run the demo, print a table and examples, and write `report.json` and `report.png`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo-intents"), help="folder of data and results")
    parser.add_argument("--language", default="en", help="language of the sentences, such as de")
    parser.add_argument("--train", type=int, default=1000, help="number of sentences to learn from")
    parser.add_argument("--port", type=int, default=0, help="port of the owner's server; 0 takes a free one")
    standard_streams.use_utf8()
    arguments = parser.parse_args()
    stop_servers_on_termination()
    folder: Path = arguments.folder
    data = folder / "data"
    folder.mkdir(parents=True, exist_ok=True)
    console.rule("Data: sentences to a smart home, by the templates of Home Assistant")
    sizes = {"train": arguments.train, "validation": _VALIDATION, "test": _TEST}
    intents.prepare(data, **sizes, language=arguments.language)
    started = time.perf_counter()
    key = tenant_key(folder)
    with owner_server(arguments.port or free_port(), folder) as url:
        results = run(Client(url, key, folder), data, folder)
    report = make_report(load_task(data / "task.toml"), list(read_pairs(data / "test.jsonl")), results)
    report["seconds"]["this_run"] = round(time.perf_counter() - started, 1)
    write_report(report, folder / "report.json")
    draw(report, folder / "report.png")
    _show(report, list(read_pairs(data / "test.jsonl")), results)
    console.print(
        f"\n{folder}/report.json and report.png written; this run took {report['seconds']['this_run']:.0f} s."
    )


def run(client: Client, data: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Run all commands; return their results by the names of the steps."""
    test, task = ["--input", data / "test.jsonl"], ["--task", data / "task.toml"]
    pairs = ["--input", data / "train.jsonl", "--validation", data / "validation.jsonl"]
    results: dict[str, dict[str, Any]] = {}

    def step(name: str, verb: str, *arguments: Any) -> None:
        results[name] = client.step(verb, list(arguments), name=name)

    console.rule("The PLM alone, with the examples of the task")
    step("plm", "apply", *task, *test)
    for mode, sharing, more in (
        ("private", [], []),
        ("shared", ["--share-targets"], ["--retrieved-examples", _RETRIEVED]),
    ):
        memory, adapter = folder / f"memory-{mode}", folder / f"adapter-{mode}"
        console.rule("PEMA, " + ("and no frame leaves this machine" if mode == "private" else "with shared frames"))
        step(f"memory-{mode}", "build-memory", *task, *pairs, "--memory", memory, *sharing)
        step(f"train-{mode}", "train", "--memory", memory, "--adapter", adapter, *_TRAINING, *more)
        step(mode, "apply", "--adapter", adapter, *test)
    console.rule("The PLM alone, with examples chosen for each sentence")
    step("plm_with_examples", "apply", "--adapter", folder / "adapter-shared", *test, "--schedule", "none")
    return results


def make_report(task: Task, pairs: list[Pair], results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of all systems, with p-values against the PLM with chosen examples, and what training chose."""
    scorer = ExtractionScorer([references_of(pair) for pair in pairs], task.answer_schema)
    answers = {name: [record["text"] for record in results[name]["texts"]] for name in SYSTEMS}
    p_values = scorer.p_values(answers[_BASELINE], list(answers.values()))
    rows = {}
    for (name, texts), p_value in zip(answers.items(), p_values, strict=True):
        (intent,) = (field.accuracy for field in scorer.table(texts) if field.field == "intent")
        rows[name] = {
            "title": SYSTEMS[name].title,
            "shows": SYSTEMS[name].shown,
            "intent_accuracy": intent,
            **scorer.scores(texts),
            "p_exact": None if name == _BASELINE else p_value["exact"],
        }
    cards = {mode: results[f"train-{mode}"]["card"] for mode in ("private", "shared")}
    return {
        "systems": rows,
        "test_sentences": len(pairs),
        "train_sentences": results["memory-shared"]["examples"],
        "adapters": {
            mode: {key: card[key] for key in ("form", "rank", "candidates", "interpolation", "nearest")}
            for mode, card in cards.items()
        },
        "history": {mode: results[f"train-{mode}"]["history"] for mode in cards},
        "validation_nll": {mode: card["validation"]["plm_nll"] for mode, card in cards.items()},
        "seconds": {name: result["seconds"] for name, result in results.items() if "seconds" in result},
        "machine": machine(),
        "command": "make demo-intents",
    }


def _show(report: Mapping[str, Any], pairs: list[Pair], results: Mapping[str, Mapping[str, Any]]) -> None:
    columns = {"intent_accuracy": "intents", "exact": "exact frames", "value_f1": "F1 of values"}
    title = f"{len(pairs)} test sentences, {report['train_sentences']} to learn from; all held to the schema"
    table = Table("", *columns.values(), "p (exact)", "shown to the owner", title=title)
    for row in report["systems"].values():
        p_value = "–" if row["p_exact"] is None else f"{row['p_exact']:.3f}"
        table.add_row(row["title"], *(f"{row[key]:.1f}" for key in columns), p_value, row["shows"])
    print_table(table, f"p: paired bootstrap against “{SYSTEMS[_BASELINE].title}”.")
    examples = Table("sentence", "", "frame", title="Side by side", show_lines=True)
    for number in range(min(_EXAMPLES_SHOWN, len(pairs))):
        frames = {SYSTEMS[name].title: results[name]["texts"][number]["text"] for name in SYSTEMS}
        frames["reference"] = str(pairs[number].target)
        examples.add_row(pairs[number].source, "\n".join(frames), "\n".join(map(_short, frames.values())))
    print_table(examples)


def _short(frame: str) -> str:
    """A frame as its intent and slots."""
    try:
        intent, *slots = json.loads(frame).items()
    except (ValueError, AttributeError):
        return frame
    return f"{intent[1]}({', '.join(f'{name}={value}' for name, value in slots)})"


if __name__ == "__main__":
    main()

"""The demo, end to end, as two parties would run it: `python -m demo.run` (or `make demo`).

The owner's server is a separate process, and every step of the data owner is a `pema-client` command. Finished steps
are reused, so that a stopped run continues where it was. `--runs 3` repeats all of it with two more owners, whose
secret bases differ, and reports the spread of the scores.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from data_owner_client import connect
from data_owner_client.runtime.atomic_files import write_atomically
from data_owner_client.runtime.console import print_table
from demo import picture, spread
from demo.steps import (
    Client,
    console,
    machine,
    owner_server,
    read_records,
    stop_servers_on_termination,
    tenant_key,
    write_report,
)
from harness.datasets import home_assistant
from harness.processes import free_port
from protocol import standard_streams

_EXAMPLES_SHOWN = 6


def main() -> None:
    """Run the demo, print a table and examples, and write `report.json` and `report.png`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="folder of data, memory and results")
    parser.add_argument("--port", type=int, default=0, help="port of the owner's server; 0 takes a free one")
    parser.add_argument(
        "--published", action="store_true", help="also translate with the paper's interpolation (takes some minutes)"
    )
    standard_streams.use_utf8()
    parser.add_argument("--runs", type=int, default=1, help="runs, each in a secret basis of its own")
    arguments = parser.parse_args()
    stop_servers_on_termination()
    folder: Path = arguments.folder
    data, port = folder / "data", arguments.port or free_port()
    folder.mkdir(parents=True, exist_ok=True)
    console.rule("Data: the interface texts of Home Assistant, English and German")
    home_assistant.prepare(data)
    # Each folder has a store of tenants with a master secret of its own, from which the basis follows.
    folders = [folder, *(folder / f"run-{number}" for number in range(2, arguments.runs + 1))]
    reports = [run(each, data, port, published=arguments.published) for each in folders]
    if len(reports) > 1:
        spread.write(reports, folder / "spread.json")
        print_table(spread.table(reports))


def run(folder: Path, data: Path, port: int, *, published: bool) -> dict[str, Any]:
    """Run all steps in `folder`; return the report."""
    memory, adapter = folder / "memory", folder / "adapter"
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    key = tenant_key(folder)
    with owner_server(port, folder) as url:
        client = Client(url, key, folder)

        console.rule("The data owner builds an external memory")
        pairs = ["--input", data / "train.jsonl", "--validation", data / "validation.jsonl"]
        built = client.step(
            "build-memory", ["--task", data / "task.toml", *pairs, "--memory", memory, "--share-targets"]
        )
        console.rule("trains an adapter")
        # Quick settings; `pema-client compare` uses all that `train` can choose by itself.
        quick = ["--minutes", 8, "--retrieved-examples", 0, "--no-gate", "--no-search", "--selection-texts", 60]
        trained = client.step("train", ["--memory", memory, "--adapter", adapter, *quick])
        console.rule("and translates the test set, with and without it")
        test = ["--adapter", adapter, "--input", data / "test.jsonl"]
        evaluated = client.step("evaluate", [*test, "--share-targets"])
        excess = _excess_tokens(url, key, evaluated["pema_texts"], data / "test.jsonl")
        gradual = None
        if published:
            console.rule("and once more with the interpolation of the paper")
            texts = client.step("translate", [*test, "--schedule", "gradual", "--lambda-max", 0.9])["texts"]
            hypotheses = folder / "gradual.txt"
            write_atomically(hypotheses, "".join(record["text"] + "\n" for record in texts).encode())
            scored = ["--input", data / "test.jsonl", "--hypotheses", hypotheses]
            gradual = client.step("evaluate", scored, name="score-gradual")["scores"]
    seconds = time.perf_counter() - started

    report = _report(built, trained, evaluated, gradual)
    report["seconds"]["this_run"] = round(seconds, 1)
    report["excess_tokens"] = excess
    write_report(report, folder / "report.json")
    picture.draw(report, trained, folder / "report.png")
    _show(report, data / "test.jsonl", evaluated)
    console.print(f"\n{folder}/report.json and report.png written; this run took {seconds:.0f} s.")
    return report


def _excess_tokens(url: str, key: str, texts: list[str], test: Path) -> int:
    """The most tokens by which a text exceeds twice its reference and ten tokens; at most 0 if none does."""
    with connect(url, api_key=key) as plm:
        count = plm.tokenizer.count
        pairs = zip(texts, read_records(test), strict=True)
        return max(count(text) - 2 * count(pair["target"]) - 10 for text, pair in pairs)


def _report(
    built: dict[str, Any], trained: dict[str, Any], evaluated: dict[str, Any], gradual: dict[str, Any] | None
) -> dict[str, Any]:
    card, perplexity = trained["card"], evaluated["perplexity"]
    plm, pema = _scores(evaluated["plm"]), _scores(evaluated["pema"])
    return {
        "plm": plm | {"ppl": perplexity["plm"]},
        "pema": pema | {"ppl": perplexity["mixture"]},
        **({"pema_published_interpolation": _scores(gradual)} if gradual else {}),
        "signatures": list(evaluated["signatures"].values()),
        "perplexity": perplexity,
        "validation_nll": {"plm": card["validation"]["plm_nll"], "mixture": card["validation"]["mixture_nll"]},
        "seconds": {
            "memory": built["seconds"],
            "train": trained["seconds"],
            "translate": evaluated["seconds"]["translate"],
            "translate_plm": evaluated["seconds"]["translate_plm"],
        },
        "memory": {"rows": built["rows"], "examples": built["examples"]},
        "adapter": {
            "form": card["form"],
            "rank": card["rank"],
            "candidates": card["candidates"],
            "interpolation": card["interpolation"],
        },
        "machine": machine(),
        "command": "make demo",
    }


def _scores(scores: dict[str, Any]) -> dict[str, float]:
    return {"bleu": scores["bleu"], "chrf": scores["chrf"]}


def _show(report: dict[str, Any], test: Path, evaluated: dict[str, Any]) -> None:
    chosen = report["adapter"]["interpolation"]
    table = Table("", "BLEU", "chrF", "perplexity", title="200 test sentences, English to German")
    rows = {
        "PLM alone, 3-shot": report["plm"],
        f"PEMA, {chosen['schedule']}, λ_max {chosen['lambda_max']} (chosen on validation)": report["pema"],
    }
    if "pema_published_interpolation" in report:
        rows["PEMA, Gradual Unrolling, λ_max 0.9 (the paper's)"] = report["pema_published_interpolation"]
    for name, row in rows.items():
        perplexity = f"{row['ppl']:.2f}" if "ppl" in row else "–"
        table.add_row(name, f"{row['bleu']:.1f}", f"{row['chrf']:.1f}", perplexity)
    print_table(table)
    examples = Table("source", "PLM", "PEMA", "reference", title="Side by side", show_lines=True)
    pairs = read_records(test)
    shown = [i for i, pair in enumerate(pairs) if len(pair["source"]) <= 70][:_EXAMPLES_SHOWN]
    for i in shown:
        examples.add_row(pairs[i]["source"], evaluated["plm_texts"][i], evaluated["pema_texts"][i], pairs[i]["target"])
    print_table(examples)


if __name__ == "__main__":
    main()

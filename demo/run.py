"""The demo, end to end, as two parties would run it: `python -m demo.run` (or `make demo`).

The owner's server is a separate process, and every step of the data owner is a `pema-client` command. Finished steps
are reused, so that a stopped run continues where it was. `--runs 3` repeats all of it with two more owners, whose
secret bases differ, and reports the spread of the scores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from data_owner_client import connect
from data_owner_client.runtime.atomic_files import write_atomically
from data_owner_client.runtime.console import PlainConsole, print_table
from demo import picture, spread
from harness.datasets import home_assistant
from harness.processes import (
    Ports,
    ServerNotReady,
    client_command,
    free_port,
    start_server,
    stop_server,
    wait_until_ready,
)
from protocol import standard_streams

_READY_WITHIN_SECONDS = 600.0
_EXAMPLES_SHOWN = 6
_TENANT = "data-owner"

console = PlainConsole()


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
    # So that a terminated demo still stops its server.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
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
    key = _tenant_key(folder)
    with _owner_server(port, folder) as url:
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
            gradual = client.step("evaluate", [*test, "--hypotheses", hypotheses], name="score-gradual")
    seconds = time.perf_counter() - started

    report = _report(built, trained, evaluated, gradual)
    report["seconds"]["this_run"] = round(seconds, 1)
    report["excess_tokens"] = excess
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    picture.draw(report, trained, folder / "report.png")
    _show(report, data / "test.jsonl", evaluated)
    console.print(f"\n{folder}/report.json and report.png written; this run took {seconds:.0f} s.")
    return report


class Client:
    """Runs `pema-client` commands and stores their results, so that a finished step is not run again.

    Args:
        url: URL of the owner's server.
        key: the data owner's API key.
        folder: folder of the results.
    """

    def __init__(self, url: str, key: str, folder: Path) -> None:
        self._url = url
        self._environment = os.environ | {"PEMA_API_KEY": key}
        self._folder = folder
        self._fresh = False

    def step(self, verb: str, arguments: list[Any], *, name: str = "") -> dict[str, Any]:
        """Run one verb, or read its result if it was run with these arguments before."""
        texts = [str(argument) for argument in arguments]
        path = self._folder / "steps" / f"{name or verb}.json"
        # A step that was run again makes the results of all later ones stale.
        if (
            not self._fresh
            and path.exists()
            and (record := json.loads(path.read_text(encoding="utf-8")))["arguments"] == texts
        ):
            console.print(f"done already: pema-client {verb} (delete {path} to run it again)")
            result: dict[str, Any] = record["result"]
            return result
        command = client_command(self._url, verb, "--json", *texts)
        console.print(f"$ pema-client {verb} {' '.join(texts)}")
        done = subprocess.run(command, stdout=subprocess.PIPE, env=self._environment, check=False)
        if done.returncode:
            sys.exit(
                f"demo: pema-client {verb} failed; its message is above, the server's log is {self._folder}/server.log"
            )
        result = json.loads(done.stdout)
        self._fresh = True
        write_atomically(path, json.dumps({"arguments": texts, "result": result}, ensure_ascii=False).encode())
        return result


def _tenant_key(folder: Path) -> str:
    """The data owner's API key. Adds the tenant first, who gets rows of candidate tokens only, in a secret basis."""
    path = folder / "key"
    path.touch(mode=0o600)
    if not path.read_text():
        console.rule("The PLM owner adds the data owner as a tenant")
        console.print(f"$ pema-server tenants add {_TENANT}")
        # If the tenant exists, an earlier run was stopped before it stored the key.
        added = _tenants(folder, "add")
        key = added if added.returncode == 0 else _tenants(folder, "rotate-key")
        if key.returncode:
            sys.exit(f"demo: {added.stderr.strip()}")
        path.write_text(key.stdout)
    return path.read_text().strip()


def _tenants(folder: Path, verb: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "plm_owner_server.cli", "tenants", verb, _TENANT, "--store", _store(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _store(folder: Path) -> str:
    return f"sqlite:///{folder / 'owner.db'}"


@contextmanager
def _owner_server(port: int, folder: Path) -> Iterator[str]:
    """Run the PLM owner's server in a separate process. Yields its URL once it is ready."""
    console.rule("The PLM owner's server starts (the first time, the model is unpacked: about a minute)")
    url, log, ports = f"http://127.0.0.1:{port}", folder / "server.log", Ports(port, 0)
    log.unlink(missing_ok=True)
    server = start_server(log, ports, "--store", _store(folder), environment={"HF_HUB_OFFLINE": "1"})
    try:
        wait_until_ready(server, url, log, within_seconds=_READY_WITHIN_SECONDS)
        yield url
    except ServerNotReady as error:
        sys.exit(f"demo: {error}")
    finally:
        if server.poll() is None:
            stop_server(server, log)


def _excess_tokens(url: str, key: str, texts: list[str], test: Path) -> int:
    """The most tokens by which a text exceeds twice its reference and ten tokens; at most 0 if none does."""
    with connect(url, api_key=key) as plm:
        count = plm.tokenizer.count
        pairs = zip(texts, _pairs(test), strict=True)
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
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.machine(),
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
        "command": "make demo",
    }


def _pairs(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


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
    pairs = _pairs(test)
    shown = [i for i, pair in enumerate(pairs) if len(pair["source"]) <= 70][:_EXAMPLES_SHOWN]
    for i in shown:
        examples.add_row(pairs[i]["source"], evaluated["plm_texts"][i], evaluated["pema_texts"][i], pairs[i]["target"])
    print_table(examples)


if __name__ == "__main__":
    main()

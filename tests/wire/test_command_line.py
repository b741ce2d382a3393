"""Command lines of `pema-client` in the same process, on a tiny model: every verb, option, output and refusal.

`tests/processes/test_command_line.py` has what needs a process: kills, pipes, interrupts, exit statuses.
"""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_owner_client import ExternalMemory, TrainedAdapter, connect
from data_owner_client.cli import app
from harness.processes import free_port
from harness.tiny_models import VOCAB_SIZE, TinyModels
from protocol.errors import ConnectionFailed, InvalidRequest
from tests import guard
from tests.command_line import client, client_json, write_pairs
from tests.support import make_service, serve, serve_over_grpc


@pytest.fixture(scope="module")
def url(tiny_models: TinyModels) -> Iterator[str]:
    with serve(make_service(tiny_models["llama"], max_sequence_tokens=512)) as url:
        yield url


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 60, seed=1)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "task.toml"
    path.write_text('name = "tiny"\nsource_label = "In"\ntarget_label = "Out"\n')
    return path


@pytest.fixture(scope="module")
def adapter(url: str, pairs: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    built = client_json(
        url, "build-memory", "--task", task, "--input", pairs, "--memory", folder / "memory", "--share-targets"
    )
    assert built["examples"] + built["validation_examples"] == 60
    assert built["context_mode"] == "teacher-forced"
    trained = client_json(
        url, "train", "--memory", folder / "memory", "--adapter", folder / "adapter",
        "--epochs", 3, "--rank", 8, "--retrieved-examples", 0, "--selection-texts", 0, "--minutes", 0,
    )  # fmt: skip
    assert trained["card"]["form"] == "residual"
    assert len([epoch for epoch in trained["history"] if epoch["phase"] == "joint"]) == 3
    return folder / "adapter"


def test_info(url: str) -> None:
    assert client_json(url, "info")["name"] == "llama"
    assert "hidden_size" in client(url, "info").stdout


def test_train_leaves_files_without_pickle(adapter: Path) -> None:
    assert sorted(path.name for path in adapter.iterdir()) == [
        "adapter.json",
        "adapter.safetensors",
        "training.json",
        "training.png",
    ]
    assert (adapter / "training.png").read_bytes().startswith(b"\x89PNG")
    card = TrainedAdapter.load(adapter).card
    assert card.validation["mixture_nll"] <= card.validation["plm_nll"]


def test_translate_in_all_ways(url: str, adapter: Path, task: Path, tmp_path: Path) -> None:
    sources = ["the thin", "die Tür", "an on her"]
    given = client(url, "translate", "--adapter", adapter, "--max-new-tokens", 8, *sources)
    assert given.returncode == 0, given.stderr
    assert len(given.stdout.splitlines()) == 3
    piped = client(url, "translate", "--adapter", adapter, "--max-new-tokens", 8, stdin="\n".join(sources))
    assert piped.stdout == given.stdout
    output = tmp_path / "out.txt"
    (tmp_path / "in.txt").write_text("\n".join(sources))
    client(
        url,
        "translate",
        "--adapter",
        adapter,
        "--max-new-tokens",
        8,
        "--input",
        tmp_path / "in.txt",
        "--output",
        output,
    )
    assert output.read_text() == given.stdout
    plain = client_json(url, "translate", "--adapter", adapter, "--max-new-tokens", 8, "--look-ahead", 0, *sources)
    assert [record["text"] for record in plain["texts"]] == given.stdout.splitlines()
    assert plain["usage"]["drafted"] == 0
    alone = client_json(url, "translate", "--task", task, "--max-new-tokens", 8, *sources)
    none = client_json(
        url, "translate", "--adapter", adapter, "--task", task, "--schedule", "none",
        "--max-new-tokens", 8, *sources
    )  # fmt: skip
    assert [r["text"] for r in alone["texts"]] == [r["text"] for r in none["texts"]]
    assert alone["usage"]["calls"] == 1


def test_grpc_gives_the_same_as_rest(
    tiny_models: TinyModels, pairs: Path, task: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = make_service(tiny_models["llama"], max_sequence_tokens=512, prefix_cache_mib=0)
    with serve(service) as rest, serve_over_grpc(service) as grpc, caplog.at_level(logging.INFO):
        told = [client_json(url, "info") for url in (grpc, rest)]
        for info in told:
            info.pop("left", None)  # of this minute, for one
        assert told[0] == told[1]
        memories = {}
        for name, url in (("grpc", grpc), ("rest", rest)):
            folder = tmp_path / name
            client_json(url, "build-memory", "--task", task, "--input", pairs, "--memory", folder, "--share-targets")
            memories[name] = ExternalMemory(folder / "train").manifest
        assert memories["grpc"] == memories["rest"]
        translate: list[Any] = ["translate", "--adapter", adapter, "--max-new-tokens", 20, "the tin on", "die Tür"]
        assert client_json(grpc, *translate)["texts"] == client_json(rest, *translate)["texts"]
    assert "gRPC Encode -> OK" in caplog.text


def test_examples_for_each_text(url: str, adapter: Path, tmp_path: Path) -> None:
    """Retrieved examples change with the text; without their file, or with another, the adapter is damaged."""
    memory = ["--memory", adapter.parent / "memory", "--adapter", tmp_path]
    trained = client_json(
        url,
        "train",
        *memory,
        "--epochs",
        1,
        "--rank",
        8,
        "--retrieved-examples",
        2,
        "--selection-texts",
        3,
        "--no-search",
    )
    assert trained["card"]["nearest"] == 2
    decoded = [option for option in trained["options"] if option["scores"] is not None]
    assert {option["interpolation"]["length_reward"] for option in decoded} == {0.0, 0.5, 1.0}
    assert len(decoded) >= 6
    assert trained["options"][0] == decoded[0]
    assert trained["card"]["interpolation"] == trained["options"][0]["interpolation"]
    texts = ["the thin", "die Tür"]
    own = client_json(url, "translate", "--adapter", tmp_path, "--schedule", "none", "--max-new-tokens", 8, *texts)
    fixed = client_json(url, "translate", "--adapter", adapter, "--schedule", "none", "--max-new-tokens", 8, *texts)
    assert own["texts"] != fixed["texts"]
    pairs = write_pairs(tmp_path / "test.jsonl", 3, seed=9)
    scores = client_json(url, "evaluate", "--adapter", tmp_path, "--input", pairs, "--share-targets")
    assert scores["perplexity"]["tokens"] > 0
    (tmp_path / "pairs.jsonl").write_text('{"source": "a", "target": "b"}\n')
    damaged = client(url, "translate", "--adapter", tmp_path, "the thin")
    assert damaged.returncode == 1
    assert "damaged" in damaged.stderr


def test_sweep(url: str, adapter: Path, tmp_path: Path) -> None:
    grid: list[Any] = [
        "--rank",
        2,
        "--rank",
        4,
        "--form",
        "paper",
        "--schedule",
        "constant",
        "--lambda-max",
        0.3,
        "--examples",
        9,
    ]
    arguments: list[Any] = ["sweep", "--memory", adapter.parent / "memory", "--folder", tmp_path, *grid]
    rows = client_json(url, *arguments)
    assert [(row["rank"], row["form"], row["lambda_max"]) for row in rows] == [(2, "paper", 0.3), (4, "paper", 0.3)]
    assert "train_seconds" in client(url, *arguments).stdout
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 3
    refused = client(url, *arguments, "--schedule", "steep")
    assert refused.returncode == 2
    assert 'Invalid value "steep" for --schedule. Choose from: "gradual", "linear"' in refused.stderr


def test_generate(url: str, adapter: Path) -> None:
    bare = client_json(url, "generate", "--max-new-tokens", 6, "the thin")
    assert bare["usage"]["tokens"] <= 6
    adapted = client_json(url, "generate", "--adapter", adapter, "--max-new-tokens", 6, "the thin", "her")
    assert len(adapted["texts"]) == 2


def test_generate_continues_a_prompt_as_it_is(url: str, tmp_path: Path) -> None:
    arguments: list[Any] = ["generate", "--max-new-tokens", 60, "def f(x):"]
    (whole,) = client_json(url, *arguments)["texts"]
    assert client(url, *arguments).stdout == f"{whole['text']}\n"
    assert client(url, *arguments, "--stream").stdout == f"{whole['text']}\n"
    stops = [whole["text"][12:15], whole["text"][20:22]]
    expected = whole["text"][: min(map(whole["text"].index, stops))]
    stopping = [option for stop in stops for option in ("--stop", stop)]
    stopped = client_json(url, *arguments, *stopping)
    assert stopped["texts"][0]["text"] == expected
    assert stopped["usage"]["tokens"] < 60
    assert client(url, *arguments, "--stream", *stopping).stdout == f"{expected}\n"
    (tmp_path / "in.txt").write_text("def f(x):\n")
    files = ["--input", tmp_path / "in.txt", "--output", tmp_path / "out.txt"]
    assert client(url, *arguments[:-1], *files).returncode == 0
    assert (tmp_path / "out.txt").read_text() == f"{' '.join(whole['text'].splitlines())}\n"


@pytest.mark.parametrize("options", [["--stop", ""], ["--stop", "a", "--stop", ""]])
def test_an_empty_stop_is_refused(url: str, options: list[str]) -> None:
    done = client(url, "generate", *options, "the thin")
    assert done.returncode == 1
    assert "A stop text is empty" in done.stderr


def test_the_bounds_of_texts_are_said_and_can_be_switched_off(url: str, adapter: Path, task: Path) -> None:
    arguments = ["--adapter", adapter, "--schedule", "constant", "--lambda-max", 0.01, "--length-reward", 20]
    sources = ["the thin", "die Tür an", "on"]
    usage = client_json(url, "translate", *arguments, *sources)["usage"]
    assert usage["length_bound_ends"] + usage["repetition_ends"] > 0
    assert "ended at" in client(url, "translate", *arguments, *sources).stderr
    for verb, *bare in (("translate", "--task", task), ("generate", "--adapter", adapter)):
        done = client(url, str(verb), *bare, "--length-bound", "the thin")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "Leave --length-bound away" in done.stderr
    off = ["--no-length-bound", "--no-repetition-bound"]
    longer = client_json(url, "translate", *arguments, *off, *sources)["usage"]
    assert longer["length_bound_ends"] == longer["repetition_ends"] == 0
    assert longer["tokens"] > usage["tokens"]


def test_a_file_with_a_text_that_is_too_long_goes_on_once_it_is_mended(url: str, adapter: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.txt", tmp_path / "out.txt"
    lines = ["the thin", "die " * 600, "shine on"]
    arguments = ["--adapter", adapter, "--input", source, "--output", output]
    source.write_text("\n".join(lines) + "\n")
    done = client(url, "translate", *arguments)
    assert done.returncode == 1
    assert f"{source}:2 has a prompt of 128 or more tokens, with nothing left for an answer" in done.stderr
    assert not output.exists()
    again = client(url, "translate", *arguments)  # the same failure, and nothing else is done again
    assert again.returncode == 1
    source.write_text("\n".join([lines[0], "die", lines[2]]) + "\n")
    done = client(url, "translate", *arguments)
    assert done.returncode == 0, done.stderr
    assert "3 texts (2 of them done before)" in done.stderr
    assert "round trips per token" in done.stderr
    assert len(output.read_text().splitlines()) == 3
    assert sorted(tmp_path.iterdir()) == [source, output]


def test_outputs_take_no_others_place(url: str, task: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("the thin\n")
    (tmp_path / "link.txt").symlink_to(source)
    arguments = ["--task", task, "--input", source, "--max-new-tokens", 4]
    for more, words in (
        (["--output", source], "--output would overwrite the file of --input"),
        (["--output", tmp_path / "link.txt"], "--output would overwrite the file of --input"),
        (["--output", output, "--explain", output], "--explain would overwrite the file of --output"),
        (["--output", tmp_path], "is a folder"),
        (["--explain", tmp_path], "is a folder"),
        (["--explain", "-"], "Give a file as --explain"),
    ):
        done = client(url, "translate", *arguments, *more)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()  # before the work
        assert words in line
    assert source.read_text() == "the thin\n"
    expected = client(url, "translate", *arguments).stdout
    assert client(url, "translate", *arguments, "--output", "-").stdout == expected
    # Links stay, and pipes are written to.
    (tmp_path / "latest.txt").symlink_to(output)
    assert client(url, "translate", *arguments, "--output", tmp_path / "latest.txt").returncode == 0
    assert (tmp_path / "latest.txt").is_symlink()
    assert output.read_text() == expected
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert client(url, "translate", *arguments, "--output", tmp_path / "pipe").returncode == 0
        assert os.read(reader, 1000).decode() == expected
    finally:
        os.close(reader)


def test_stream_and_explain(url: str, adapter: Path, tmp_path: Path) -> None:
    arguments = ["--adapter", adapter, "--schedule", "constant", "--lambda-max", 0.6, "--dtype", "float32"]
    (plain,) = client_json(url, "translate", *arguments, "the thin")["texts"]
    assert client(url, "translate", *arguments, "--stream", "the thin").stdout == plain["text"] + "\n"
    done = client(url, "translate", *arguments, "--stream", "the thin", "her")
    assert done.returncode == 1
    assert "one text" in done.stderr
    client_json(url, "translate", *arguments, "--explain", tmp_path / "why.jsonl", "the thin", "her")
    first, second = map(json.loads, (tmp_path / "why.jsonl").read_text().splitlines())
    assert (first["text"], second["source"]) == (plain["text"], "her")
    for token in [*first["tokens"], *second["tokens"]]:
        assert token["lambda"] == 0.6
        assert token["p"] == pytest.approx(0.4 * token["p_plm"] + 0.6 * token["p_pema"])
        assert token["token"] in (token["plm_alone"], token["pema_alone"]) or token["p_plm"] * token["p_pema"] > 0


def test_sampling_and_lookup(url: str, adapter: Path, task: Path, pairs: Path, tmp_path: Path) -> None:
    drawn = ["--adapter", adapter, "--temperature", 1.2, "--seed", 4, "--max-new-tokens", 8]
    if guard.current:  # without the whole head
        drawn += ["--candidates-only"]
    one = client_json(url, "translate", *drawn, "the thin", "shine on")
    assert one == client_json(url, "translate", *drawn, "--look-ahead", 0, "the thin", "shine on") | {
        "usage": one["usage"]
    }
    three = client_json(url, "translate", *drawn, "--samples", 5, "--best", 3, "the thin")
    (text,) = three["texts"]
    assert text["text"] == text["best"][0]
    assert len(set(text["best"])) > 1
    for arguments, words in (
        (["--samples", 2], "Without a temperature"),
        (["--top-p", 0.9], "--top-p limits what is drawn"),
        (["--top-k", 5], "leave --top-k away"),
        (["--candidates-only"], "Give --temperature"),
        (["--temperature", 1, "--best", 2], "Give more --samples"),
        (["--temperature", 1, "--samples", 2, "--consensus", 4], "Give one of them"),
        (["--consensus", 4, "--stream"], "Leave --consensus"),
        (["--temperature", 1, "--samples", 4, "--best", 2], "Say --json"),
        (["--json", "--stream"], "--stream shows a text on standard output"),
        (["--stream", "--output", tmp_path / "out.txt"], "--stream shows a text on standard output"),
    ):
        done = client(url, "translate", "--adapter", adapter, *arguments, "the thin")
        assert done.returncode == 1
        assert words in done.stderr

    done = client(url, "translate", "--task", task, "--temperature", 1, "--candidates-only", "the thin")
    assert done.returncode == 1
    assert "no candidates" in done.stderr

    memory = adapter.parent / "memory"
    plain = client_json(url, "translate", "--adapter", adapter, "the thin")
    looked_up = client_json(url, "translate", "--adapter", adapter, "--lookup", memory, "the thin")
    assert looked_up["texts"] == plain["texts"]
    client_json(url, "build-memory", "--task", task, "--input", pairs, "--memory", tmp_path)
    done = client(url, "translate", "--adapter", adapter, "--lookup", tmp_path, "the thin")
    assert done.returncode == 1
    assert "never shown to the PLM's owner" in done.stderr


def test_beams_and_effort(url: str, adapter: Path, task: Path, tmp_path: Path) -> None:
    given = ["--adapter", adapter, "--max-new-tokens", 8, "--dtype", "float32"]
    sources = ["the thin", "her", "shine on"]
    four = client_json(url, "translate", *given, "--beams", 4, "--best", 3, "--explain", tmp_path / "why", *sources)
    assert all(text["text"] == text["best"][0] and len(text["best"]) == 3 for text in four["texts"])
    # Three texts on the way, four beams of each: the calls are those of the longest one.
    assert four["usage"]["calls"] <= 8
    assert four["usage"]["tokens"] > 3 * four["usage"]["calls"]
    assert min(four["usage"]["bytes_sent"], four["usage"]["bytes_received"]) > 0
    for text, line in zip(four["texts"], (tmp_path / "why").read_text().splitlines(), strict=True):
        assert json.loads(line)["text"] == text["text"]
        assert all(0 < token["p"] <= 1 for token in json.loads(line)["tokens"])
    texts = [text["text"] for text in four["texts"]]
    medium = client(url, "apply", *given, "--effort", "medium", *sources)
    assert medium.stdout.splitlines() == texts
    low, greedy = (client(url, "apply", *given, *effort, *sources) for effort in (["--effort", "low"], []))
    assert low.stdout == greedy.stdout
    high, drawn = (
        client_json(url, "apply", *given, *one, *sources) for one in (["--effort", "high"], ["--consensus", 8])
    )
    assert high["texts"] == drawn["texts"]

    output = tmp_path / "out.txt"
    (tmp_path / "in.txt").write_text("\n".join(sources))
    begun = [*given, "--input", tmp_path / "in.txt", "--output", output]
    assert client(url, "translate", *begun, "--effort", "medium").returncode == 0
    assert output.read_text().splitlines() == texts

    for arguments, words in (
        (["--beams", 2, "--consensus", 2], "two ways to search"),
        (["--beams", 2, "--temperature", 1], "draws none"),
        (["--effort", "medium", "--candidates-only"], "a beam search draws none. Leave it away"),
        (["--beams", 2, "--stream"], "Leave --consensus, --samples, --beams and --effort away"),
        (["--effort", "high", "--stream"], "Leave --consensus, --samples, --beams and --effort away"),
        (["--beams", 2, "--lookup", adapter.parent / "memory"], "--lookup finds drafts"),
        (["--effort", "high", "--consensus", 2], "both say how texts are searched"),
        (["--length-penalty", 2], "Give --beams"),
        (["--beams", 2, "--best", 2], "Say --json"),
    ):
        done = client(url, "translate", "--adapter", adapter, *arguments, "the thin")
        assert done.returncode == 1
        assert words in done.stderr
    if not guard.current:  # with the whole head
        (text,) = client_json(url, "generate", "the thin", "--beams", 3, "--best", 3, "--max-new-tokens", 6)["texts"]
        assert len(set(text["best"])) == 3


def test_evaluate(url: str, adapter: Path, tmp_path: Path) -> None:
    test = write_pairs(tmp_path / "test.jsonl", 7, seed=2)
    scores = client_json(url, "evaluate", "--adapter", adapter, "--input", test, "--max-new-tokens", 8)
    assert scores["perplexity"] is None, "perplexity would show the references"
    assert "nrefs:1" in scores["signatures"]["bleu"]
    assert "nrefs:1" in scores["signatures"]["chrf"]
    assert scores["headline"] == "chrf"
    assert set(scores["p_values"]) == set(scores["plm"]) == {"bleu", "chrf"}
    searched = client_json(url, "evaluate", "--adapter", adapter, "--input", test, "--max-new-tokens", 8, "--beams", 3)
    assert searched["plm_texts"] == scores["plm_texts"]
    assert searched["plm_usage"]["round_trips"] == scores["plm_usage"]["round_trips"]
    assert searched["pema_usage"]["round_trips"] > scores["pema_usage"]["round_trips"]
    assert min(scores["pema_usage"]["bytes_sent"], scores["pema_usage"]["bytes_received"]) > 0
    shared = client_json(
        url, "evaluate", "--adapter", adapter, "--input", test, "--max-new-tokens", 8, "--share-targets"
    )
    assert shared["perplexity"]["mixture"] > 1
    assert shared["pema"] == scores["pema"]
    table = client(url, "evaluate", "--adapter", adapter, "--input", test, "--max-new-tokens", 8, "--share-targets")
    assert "PLM + adapter" in table.stdout
    references = [json.loads(line)["target"] for line in test.read_text().splitlines()]
    (tmp_path / "hypotheses.txt").write_text("\n".join(references))
    perfect = client_json(None, "evaluate", "--input", test, "--hypotheses", tmp_path / "hypotheses.txt")
    assert perfect["scores"]["chrf"] == pytest.approx(100)


def test_what_leaves_the_machine_is_said(url: str, pairs: Path, task: Path, tmp_path: Path) -> None:
    arguments = ["--input", pairs, "--task", task, "--memory"]
    private = client(url, "build-memory", *arguments, tmp_path / "private")
    assert private.returncode == 0
    assert "No target text" in private.stderr
    shared = client(url, "build-memory", *arguments, tmp_path / "shared", "--share-targets")
    assert shared.returncode == 0
    assert "every target text" in shared.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build-memory", "--input", "PAIRS", "--context", "teacher-forced"], "--share-targets"),
        (["build-memory", "--input", "missing.jsonl"], "cannot be read"),
        (["build-memory", "--input", "PAIRS", "--task", "nonsense"], "built-in task"),
        (["build-memory", "--sources", "PAIRS"], "--sources with --targets"),
        (["train", "--memory", "nowhere"], "holds no memory"),
        (["translate", "--adapter", "nowhere", "text"], "holds no adapter"),
        (["translate", "text"], "Give one with --task"),
        (["translate", "--task", "translate-en-de", "x" * 2000], "Shorten"),
        (["evaluate", "--input", "PAIRS"], "--adapter"),
    ],
)
def test_mistakes_end_with_one_clear_line(
    url: str, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = client(url, arguments[0], *[str(pairs) if a == "PAIRS" else a for a in arguments[1:]])
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("pema-client: ")
    assert message in last


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_that_is_not_there_is_explained(scheme: str) -> None:
    with pytest.raises(ConnectionFailed, match="pema-server serve"):
        connect(guard.url(scheme, free_port()), **guard.credentials())
    with pytest.raises(InvalidRequest, match="is not the address"):
        connect("localhost:8000")


@pytest.mark.unguarded("needs the whole head")
def test_the_full_vocabulary(url: str, adapter: Path, tmp_path: Path) -> None:
    what = [
        "--memory",
        adapter.parent / "memory",
        "--adapter",
        tmp_path,
        "--epochs",
        1,
        "--rank",
        8,
        "--no-search",
        "--selection-texts",
        2,
    ]
    card = client_json(url, "train", *what, "--full-vocabulary")["card"]
    assert card["candidates"] == VOCAB_SIZE
    assert card["validation"]["coverage"] == 1.0
    translated = client_json(url, "translate", "--adapter", tmp_path, "one two", "--max-new-tokens", 4)
    assert translated["texts"][0]["text"] is not None


def test_help_has_examples() -> None:
    for verb in (name for name in app if not name.startswith("-")):
        shown = client(None, verb, "--help").stdout
        assert f"pema-client {verb}" in shown

"""`pema-client translate` and `generate`."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.cli.app import command, set_threads
from data_owner_client.cli.inputs import sources_of
from data_owner_client.cli.options import (
    AsJson,
    DecodingOptions,
    Explain,
    FileFormat,
    InputFile,
    OptionalAdapter,
    Output,
    SamplingOptions,
    ServerOptions,
    SourceField,
    Stream,
)
from data_owner_client.cli.output import stream_text, write_texts
from data_owner_client.data.tasks import Task, load_task
from data_owner_client.decoding import generation
from data_owner_client.runtime.progress import RichReporter
from protocol.errors import InvalidData


@command()
def translate(
    server: ServerOptions,
    decoding: DecodingOptions,
    draws: SamplingOptions,
    texts: Annotated[list[str] | None, typer.Argument(help="Source texts; or give --input.")] = None,
    adapter: OptionalAdapter = None,
    task: Annotated[str | None, typer.Option(help="Built-in task or TOML file; default: the adapter's.")] = None,
    input_file: InputFile = None,
    output: Output = None,
    file_format: FileFormat = None,
    source_field: SourceField = "source",
    stream: Stream = False,
    explain: Explain = None,
    as_json: AsJson = False,
) -> None:
    """Translate source texts with a task's prompt, one output line each.

    Examples:

    - `pema-client translate --adapter adapter "The device is offline."`
    - `pema-client translate --adapter adapter --input test.jsonl --output test.de`
    - `pema-client translate --task translate-en-de < texts.txt`
    - `pema-client translate --adapter adapter --schedule gradual --lambda-max 0.9 --input test.txt`
    - `pema-client translate --adapter adapter --consensus 8 --input test.jsonl --output test.de`
    - `pema-client translate --adapter adapter --explain why.jsonl "The device is offline."`
    """
    set_threads(decoding.threads)
    inputs = sources_of(texts, input_file, file_format, source_field)
    trained = TrainedAdapter.load(adapter) if adapter else None
    with server.connect(decoding.dtype) as plm:
        chosen = load_task(task) if task else None
        run = partial(generation.translate, plm, adapter=trained, task=chosen, **_how(decoding, draws, trained))
        identity = ["translate", plm.card.digest, trained and trained.card, chosen, *decoding.identity(trained), draws]
        if stream:
            _require_one(decoding, draws)
            stream_text(inputs, run, chosen or (trained.card.task if trained else Task(name="bare")), plm.tokenizer)
        else:
            write_texts(inputs, run, identity, output, as_json, explain, plm.tokenizer)


@command()
def generate(
    server: ServerOptions,
    decoding: DecodingOptions,
    draws: SamplingOptions,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts, used as they are; or give --input.")] = None,
    adapter: OptionalAdapter = None,
    input_file: InputFile = None,
    output: Output = None,
    file_format: FileFormat = None,
    source_field: SourceField = "source",
    stream: Stream = False,
    explain: Explain = None,
    as_json: AsJson = False,
) -> None:
    """Continue prompts as they are, without a template, up to the stop of the adapter's task (else a newline).

    Examples:

    - `pema-client generate "The capital of France is"`
    - `pema-client generate --adapter adapter --input prompts.txt --json`
    """
    set_threads(decoding.threads)
    inputs = sources_of(prompts, input_file, file_format, source_field)
    trained = TrainedAdapter.load(adapter) if adapter else None
    with server.connect(decoding.dtype) as plm:
        run = partial(generation.generate, plm, adapter=trained, **_how(decoding, draws, trained))
        identity = ["generate", plm.card.digest, trained and trained.card, *decoding.identity(trained), draws]
        if stream:
            _require_one(decoding, draws)
            stream_text(inputs, run, trained.card.task if trained else Task(name="bare"), plm.tokenizer)
        else:
            write_texts(inputs, run, identity, output, as_json, explain, plm.tokenizer)


def _how(decoding: DecodingOptions, draws: SamplingOptions, adapter: TrainedAdapter | None) -> dict[str, Any]:
    """What `translate` and `generate` have in common."""
    return {
        "interpolation": decoding.interpolation(adapter),
        "decoding": decoding.settings,
        "lookup": decoding.drafts(),
        "sampling": draws.sampling(decoding.consensus),
        "samples": draws.samples,
        "best": draws.best,
        "consensus": decoding.consensus,
        "reporter": RichReporter(),
    }


def _require_one(decoding: DecodingOptions, draws: SamplingOptions) -> None:
    if decoding.consensus or draws.samples > 1:
        raise InvalidData(
            "--stream shows a text as it grows, and of several the best is known at the end.",
            hint="Leave --consensus and --samples away.",
        )

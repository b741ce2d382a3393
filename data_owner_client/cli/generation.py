"""`pema-client apply` (`translate`) and `generate`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from data_owner_client.cli.app import command, set_threads
from data_owner_client.cli.inputs import sources_of
from data_owner_client.cli.options import (
    DATA,
    DEFAULT_OPTIONS,
    DEFAULT_SERVER,
    AsJson,
    Best,
    Connection,
    Decoding,
    DecodingOptions,
    Dtype,
    Explain,
    FileFormat,
    InputFile,
    MoreDecoding,
    OptionalAdapter,
    OutputFile,
    Samples,
    Sampling,
    Server,
    SourceField,
    Stream,
    Threads,
    connected,
    sampling_of,
)
from data_owner_client.decoding.settings import DEFAULT_DECODING, DEFAULT_SAMPLING, DecodingSettings, SamplingSettings
from data_owner_client.plm.connection.settings import DEFAULT_CONNECTION
from protocol.errors import InvalidData

if TYPE_CHECKING:
    from data_owner_client.adapter.trained import TrainedAdapter


@command(("apply", "translate"))
def apply(
    texts: Annotated[
        list[str] | None, Parameter(help="Source texts; or give --input.", allow_leading_hyphen=False)
    ] = None,
    /,
    *,
    adapter_folder: OptionalAdapter = None,
    task: Annotated[
        str | None, Parameter(help="Name of a built-in task, or a TOML file. Default: the adapter's.", group=DATA)
    ] = None,
    input_file: InputFile = None,
    file_format: FileFormat = None,
    source_field: SourceField = "source",
    options: MoreDecoding = DEFAULT_OPTIONS,
    decoding: Decoding = DEFAULT_DECODING,
    sampling: Sampling = DEFAULT_SAMPLING,
    samples: Samples = 1,
    best: Best = 1,
    output: OutputFile = None,
    stream: Stream = False,
    explain: Explain = None,
    as_json: AsJson = False,
    threads: Threads = 0,
    server: Server = DEFAULT_SERVER,
    connection: Connection = DEFAULT_CONNECTION,
    dtype: Dtype = "float16",
) -> None:
    """Answer source texts with a task's prompt, such as translations or rewritten sentences, one output line each.

    Examples:

    - `pema-client apply --adapter adapter "The device is offline."`
    - `pema-client translate --adapter adapter --input test.jsonl --output test.de`
    - `pema-client apply --task translate-en-de < texts.txt`
    - `pema-client apply --adapter adapter --schedule gradual --lambda-max 0.9 --input test.txt`
    - `pema-client apply --adapter adapter --consensus 8 --input test.jsonl --output test.de`
    - `pema-client apply --adapter adapter --explain why.jsonl "The device is offline."`
    """
    from data_owner_client.cli.output import stream_text, write_texts
    from data_owner_client.data.tasks import Task, load_task
    from data_owner_client.decoding import generation

    set_threads(threads)
    inputs = sources_of(texts, input_file, file_format, source_field)
    adapter = _adapter(adapter_folder)
    how = _how(adapter, options, decoding, sampling, samples, best)
    with connected(server, connection, dtype) as plm:
        chosen = load_task(task) if task else None
        run = partial(generation.translate, plm, adapter=adapter, task=chosen, **how)
        if stream:
            _require_one(options.consensus, samples)
            stream_text(inputs, run, chosen or (adapter.card.task if adapter else Task(name="bare")), plm.tokenizer)
        else:
            changing = _changing(adapter, options, decoding, sampling, samples, best)
            identity = ["translate", plm.card.digest, chosen, dtype, *changing]
            write_texts(inputs, run, identity, output, as_json, explain, plm.tokenizer)


@command()
def generate(
    prompts: Annotated[
        list[str] | None,
        Parameter(help="Prompts, used as they are; or give --input.", allow_leading_hyphen=False),
    ] = None,
    /,
    *,
    adapter_folder: OptionalAdapter = None,
    input_file: InputFile = None,
    file_format: FileFormat = None,
    source_field: SourceField = "source",
    options: MoreDecoding = DEFAULT_OPTIONS,
    decoding: Decoding = DEFAULT_DECODING,
    sampling: Sampling = DEFAULT_SAMPLING,
    samples: Samples = 1,
    best: Best = 1,
    output: OutputFile = None,
    stream: Stream = False,
    explain: Explain = None,
    as_json: AsJson = False,
    threads: Threads = 0,
    server: Server = DEFAULT_SERVER,
    connection: Connection = DEFAULT_CONNECTION,
    dtype: Dtype = "float16",
) -> None:
    """Continue prompts as they are, without a template, up to the stop of the adapter's task (else a newline).

    Examples:

    - `pema-client generate "The capital of France is"`
    - `pema-client generate --adapter adapter --input prompts.txt --json`
    """
    from data_owner_client.cli.output import stream_text, write_texts
    from data_owner_client.data.tasks import Task
    from data_owner_client.decoding import generation

    set_threads(threads)
    inputs = sources_of(prompts, input_file, file_format, source_field)
    adapter = _adapter(adapter_folder)
    how = _how(adapter, options, decoding, sampling, samples, best)
    with connected(server, connection, dtype) as plm:
        run = partial(generation.generate, plm, adapter=adapter, **how)
        if stream:
            _require_one(options.consensus, samples)
            stream_text(inputs, run, adapter.card.task if adapter else Task(name="bare"), plm.tokenizer)
        else:
            changing = _changing(adapter, options, decoding, sampling, samples, best)
            identity = ["generate", plm.card.digest, dtype, *changing]
            write_texts(inputs, run, identity, output, as_json, explain, plm.tokenizer)


def _adapter(folder: Path | None) -> TrainedAdapter | None:
    from data_owner_client.adapter.trained import TrainedAdapter

    return TrainedAdapter.load(folder) if folder else None


def _how(
    adapter: TrainedAdapter | None,
    options: DecodingOptions,
    decoding: DecodingSettings,
    sampling: SamplingSettings,
    samples: int,
    best: int,
) -> dict[str, Any]:
    """The arguments that `translate` and `generate` have in common."""
    from data_owner_client.runtime.progress import RichReporter

    return {
        "interpolation": options.interpolation(adapter),
        "decoding": decoding,
        "lookup": options.drafter(),
        "sampling": sampling_of(sampling, samples=samples, best=best, consensus=options.consensus),
        "samples": samples,
        "best": best,
        "consensus": options.consensus,
        "reporter": RichReporter(),
    }


def _changing(
    adapter: TrainedAdapter | None,
    options: DecodingOptions,
    decoding: DecodingSettings,
    sampling: SamplingSettings,
    samples: int,
    best: int,
) -> list[object]:
    """Everything in the options that can change a text."""
    return [
        adapter and adapter.card,
        options.interpolation(adapter),
        decoding.max_new_tokens,
        options.consensus,
        sampling,
        samples,
        best,
    ]


def _require_one(consensus: int, samples: int) -> None:
    if consensus or samples > 1:
        raise InvalidData(
            "--stream shows a text as it grows, and of several the best is known at the end.",
            hint="Leave --consensus and --samples away.",
        )

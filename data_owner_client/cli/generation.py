"""`pema-client apply` (`translate`) and `generate`."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
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
    Dtype,
    Explain,
    InputFile,
    MoreDecoding,
    OptionalAdapter,
    OutputFile,
    Reading,
    Samples,
    Sampling,
    Server,
    Stop,
    Stream,
    Threads,
    connected,
    sampling_of,
)
from data_owner_client.data.reading.settings import DEFAULT_READING
from data_owner_client.decoding.settings import (
    DEFAULT_DECODING,
    DEFAULT_SAMPLING,
    LABELS_ALONE_TOLERANCE,
    DecodingSettings,
)
from data_owner_client.plm.connection.settings import DEFAULT_CONNECTION
from data_owner_client.runtime.atomic_files import is_replaceable
from protocol.errors import InvalidData

if TYPE_CHECKING:
    from data_owner_client.adapter.trained import TrainedAdapter
    from data_owner_client.decoding.generation import Generation
    from data_owner_client.decoding.search_options import SearchOptions


@dataclass(frozen=True, kw_only=True)
class _Options:
    """The options that `apply` and `generate` have in common."""

    adapter_folder: OptionalAdapter = None
    input_file: InputFile = None
    reading: Reading = DEFAULT_READING
    more: MoreDecoding = DEFAULT_OPTIONS
    decoding: Decoding = DEFAULT_DECODING
    sampling: Sampling = DEFAULT_SAMPLING
    samples: Samples = 1
    best: Best = 1
    output: OutputFile = None
    stream: Stream = False
    explain: Explain = None
    as_json: AsJson = False
    threads: Threads = 0
    server: Server = DEFAULT_SERVER
    connection: Connection = DEFAULT_CONNECTION
    dtype: Dtype = "float16"

    def adapter(self) -> TrainedAdapter | None:
        """The adapter of the folder, if any."""
        from data_owner_client.adapter.trained import TrainedAdapter

        return TrainedAdapter.load(self.adapter_folder) if self.adapter_folder else None

    def arguments(self, adapter: TrainedAdapter | None) -> dict[str, Any]:
        """The arguments that `translate` and `generate` of the library have in common."""
        return {
            "adapter": adapter,
            "interpolation": self.more.interpolation(adapter),
            "decoding": self._decoding,
            "lookup": self.more.drafter(),
            "sampling": sampling_of(self.sampling, self.search),
            "samples": self.samples,
            "best": self.best,
            "consensus": self.more.consensus,
            "beams": self.more.beams,
            "length_penalty": self.more.length_penalty,
            "effort": self.more.effort,
        }

    @property
    def search(self) -> SearchOptions:
        """The search for the texts of an input."""
        return self.more.search(self.samples, self.best)

    @property
    def _decoding(self) -> DecodingSettings:
        """The settings; where no probabilities of labels are printed, only the most probable label need be exact."""
        if self.decoding.label_tolerance is not None or self.as_json:
            return self.decoding
        return replace(self.decoding, label_tolerance=LABELS_ALONE_TOLERANCE)

    def changing(self, adapter: TrainedAdapter | None) -> list[object]:
        """Everything in the options that can change a text."""
        return [
            adapter and adapter.card,
            self.more.interpolation(adapter),
            self.decoding.bounds_of_texts,
            self.search,
            self.sampling,
            self.dtype,
        ]


_Common = Annotated[_Options, Parameter(name="*")]
_DEFAULTS = _Options()


@command(("apply", "translate"))
def apply(
    texts: Annotated[
        list[str] | None, Parameter(help="Source texts; or give --input.", allow_leading_hyphen=False)
    ] = None,
    /,
    *,
    task: Annotated[
        str | None,
        Parameter(help="Name of a built-in task, or a TOML file. Default: the adapter's.", group=DATA, validator=None),
    ] = None,
    options: _Common = _DEFAULTS,
) -> None:
    """Answer source texts with a task's prompt, such as translations or rewritten sentences, one output line each.

    Examples:

    - `pema-client apply --adapter adapter "The device is offline."`
    - `pema-client translate --adapter adapter --input test.jsonl --output test.de`
    - `pema-client apply --task translate-en-de < texts.txt`
    - `pema-client apply --adapter adapter --schedule gradual --lambda-max 0.9 --input test.txt`
    - `pema-client apply --adapter adapter --beams 4 --length-penalty 1.2 --input test.jsonl --output test.de`
    - `pema-client apply --adapter adapter --effort high --input test.jsonl --output test.de`
    - `pema-client apply --adapter adapter --explain why.jsonl "The device is offline."`
    """
    from data_owner_client.data.tasks import load_task
    from data_owner_client.decoding.generation import translate

    _answer(texts, options, partial(translate, task=load_task(task) if task else None))


@command()
def generate(
    prompts: Annotated[
        list[str] | None,
        Parameter(help="Prompts, used as they are; or give --input.", allow_leading_hyphen=False),
    ] = None,
    /,
    *,
    stop: Stop = None,
    options: _Common = _DEFAULTS,
) -> None:
    r"""Continue prompts as they are, without a template, up to the model's own end, a --stop or the longest length.

    The text of a single prompt is printed as it is. Of several, and in files, each becomes one line; --json has them
    as they are.

    Examples:

    - `pema-client generate "The capital of France is"`
    - `pema-client generate "Shopping list:" --stop $'\n\n' --stop "###" --max-new-tokens 200`
    - `pema-client generate --adapter adapter --input prompts.txt --json`
    """
    from data_owner_client.decoding import generation

    _answer(prompts, options, partial(generation.generate, stop=stop or []), verbatim=True)


def _answer(texts: list[str] | None, options: _Options, run: partial[Generation], *, verbatim: bool = False) -> None:
    """Generate and print.

    Args:
        texts: texts of the command line, if any.
        options: options of the command.
        run: `translate` or `generate` of the library, with the arguments that only it has.
        verbatim: print a single text with its line ends.
    """
    from data_owner_client.cli.output import stream_text, write_texts

    set_threads(options.threads)
    _require_files(options)
    inputs = sources_of(texts, options.input_file, options.reading, trim=not verbatim)
    adapter = options.adapter()
    arguments, own = options.arguments(adapter), run.keywords
    if options.decoding.length_bound and (adapter is None or verbatim):
        raise InvalidData(
            "A length bound comes from the memory of an adapter, for a source text.",
            hint="Leave --length-bound away; --max-new-tokens is the longest length.",
        )
    if options.best > 1 and not options.as_json:
        raise InvalidData("Only JSON has room for several texts of each input.", hint="Say --json, or no --best.")
    with connected(options.server, options.connection, options.dtype) as plm:
        run = partial(run, plm, **arguments)
        if options.stream:
            _require_one(options)
            stream_text(inputs, run)
        else:
            identity = [run.func.__name__, plm.card.digest, own, *options.changing(adapter)]
            output = None if options.output == Path("-") else options.output
            files = output, options.as_json, options.explain
            write_texts(
                inputs,
                run,
                identity,
                *files,
                plm.tokenizer,
                verbatim=verbatim,
                skip_invalid=options.reading.skip_invalid,
            )


def _require_one(options: _Options) -> None:
    search = options.search
    if search.consensus or search.samples > 1 or search.beams > 1:
        raise InvalidData(
            "--stream shows a text as it grows, and of several the best is known at the end.",
            hint="Leave --consensus, --samples, --beams and --effort away.",
        )
    if options.output is not None or options.as_json or options.explain is not None:
        raise InvalidData(
            "--stream shows a text on standard output alone.", hint="Leave --output, --json and --explain away."
        )


def _require_files(options: _Options) -> None:
    """Refuse files that would overwrite each other or the input, and folders in their place, before the work."""
    files = {"--input": options.input_file, "--output": options.output, "--explain": options.explain}
    if options.explain == Path("-"):
        raise InvalidData("Standard output has the texts alone.", hint="Give a file as --explain.")
    places: dict[str, str] = {}
    for name, path in files.items():
        if path is None or path == Path("-"):
            continue
        if path.is_dir():
            raise InvalidData(f"{path} is a folder.", hint=f"Give a file as {name}.")
        if is_replaceable(path) and (other := places.setdefault(os.path.realpath(path), name)) != name:
            raise InvalidData(f"{name} would overwrite the file of {other}.", hint=f"Give another {name}.")

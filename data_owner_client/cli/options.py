"""Options that several verbs of `pema-client` share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from data_owner_client.adapter.interpolation import Interpolation, Schedule
from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.data.pairs import Format
from data_owner_client.decoding.client_drafts import NgramDrafter
from data_owner_client.decoding.generation import CONSENSUS_TEMPERATURE, ngram_drafter_for
from data_owner_client.decoding.sampling import Sampling
from data_owner_client.decoding.speculative import DecodingSettings
from data_owner_client.plm.connect import connect
from data_owner_client.plm.connection.retries import RETRY_FOR_SECONDS
from data_owner_client.plm.remote_plm import RemotePlm
from protocol.errors import InvalidData
from protocol.types import WireDtype

_Server = Annotated[
    str,
    typer.Option(
        "--server",
        envvar="PEMA_SERVER",
        help="Address of the PLM owner's server: http://, https://, grpc:// or grpcs://.",
        rich_help_panel="Connection",
    ),
]
_ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="PEMA_API_KEY",
        help="Key that the owner gave you. Better set in the environment: everybody on the machine can see options.",
        rich_help_panel="Connection",
    ),
]
_Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure",
        help="Send the key unencrypted, over http:// or grpc:// to another machine.",
        rich_help_panel="Connection",
    ),
]
_Authority = Annotated[
    Path | None,
    typer.Option(
        "--ca",
        envvar="PEMA_CA",
        help="PEM file of the authority that signed the server's certificate, where it is none that all know.",
        rich_help_panel="Connection",
    ),
]
_ClientCertificate = Annotated[
    Path | None,
    typer.Option(
        "--client-certificate",
        envvar="PEMA_CLIENT_CERTIFICATE",
        help="PEM file of your own certificate, where the owner asks for one.",
        rich_help_panel="Connection",
    ),
]
_ClientKey = Annotated[
    Path | None,
    typer.Option(
        "--client-key",
        envvar="PEMA_CLIENT_KEY",
        help="PEM file of its private key, without a password.",
        rich_help_panel="Connection",
    ),
]
_Timeout = Annotated[
    float,
    typer.Option("--timeout", min=0.1, help="Longest wait for one answer, in seconds.", rich_help_panel="Connection"),
]
_GiveUpAfter = Annotated[
    float,
    typer.Option(
        "--give-up-after",
        min=0.0,
        help="How long to try again when the server is gone or too busy, in seconds.",
        rich_help_panel="Connection",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Dtype = Annotated[
    WireDtype, typer.Option(help="Number format of representations on the wire and on disk; int8 is half of float16.")
]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads of this client; 0 for all cores.")]
MemoryFolder = Annotated[Path, typer.Option("--memory", help="Folder of the external memory.")]
AdapterFolder = Annotated[Path, typer.Option("--adapter", help="Folder of the adapter.")]
OptionalAdapter = Annotated[Path | None, typer.Option("--adapter", help="Folder of the adapter; none: the PLM alone.")]
InputFile = Annotated[
    Path | None, typer.Option("--input", help="JSONL, TSV, CSV or text with one source a line; - is standard input.")
]
Sources = Annotated[Path | None, typer.Option(help="Text file with one source a line; goes with --targets.")]
Targets = Annotated[Path | None, typer.Option(help="Text file with one target a line; goes with --sources.")]
FileFormat = Annotated[Format | None, typer.Option("--format", help="Format of the input; default: from its suffix.")]
SourceField = Annotated[str, typer.Option(help="Name of the source field or column.")]
TargetField = Annotated[str, typer.Option(help="Name of the target field or column.")]
Output = Annotated[
    Path | None, typer.Option("--output", help="File for the texts, one a line; default: standard output.")
]
OptionalSchedule = Annotated[
    Schedule | None, typer.Option(help="Schedule of λ; default: what training chose on the validation memory.")
]
LambdaMax = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="λ_max; default: what training chose, or 0.9.")]
LengthReward = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=20.0,
        help="Nats by which the end is less likely to be chosen; more make longer texts. Default: what training chose.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
LookAhead = Annotated[
    int | None,
    typer.Option(
        min=0, help="Tokens that the server drafts per call; default: as many as pay. Never changes the text."
    ),
]
Stream = Annotated[bool, typer.Option("--stream", help="Show one text as it grows.")]
Explain = Annotated[
    Path | None,
    typer.Option(
        help="JSONL file for how every token was chosen: λ, its probabilities, what PLM and adapter alone would have "
        "chosen."
    ),
]
LookupFolder = Annotated[
    Path | None,
    typer.Option(
        "--lookup",
        help="Memory whose targets are looked up for drafts. The owner of the PLM sees the drafts, so it must be a "
        "memory that was built with --share-targets.",
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        min=0.0, help="Draw tokens at this temperature; 0 takes the most probable.", rich_help_panel="Sampling"
    ),
]
TopP = Annotated[
    float,
    typer.Option(min=0.0, max=1.0, help="Draw from the most probable tokens of this mass.", rich_help_panel="Sampling"),
]
TopK = Annotated[
    int, typer.Option(min=0, help="Draw from so many most probable tokens; 0 for all.", rich_help_panel="Sampling")
]
RepetitionPenalty = Annotated[
    float, typer.Option(min=1.0, help="Make tokens that occurred less probable.", rich_help_panel="Sampling")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all draws.", rich_help_panel="Sampling")]
Samples = Annotated[int, typer.Option(min=1, help="Texts drawn for every input.", rich_help_panel="Sampling")]
Best = Annotated[
    int, typer.Option(min=1, help="Of these, how many most probable ones to give.", rich_help_panel="Sampling")
]
KnownOnly = Annotated[
    bool,
    typer.Option(
        "--known-only",
        help="Draw from the adapter's candidates and the PLM's most probable token only: needs no whole LM head.",
        rich_help_panel="Sampling",
    ),
]
Consensus = Annotated[
    int,
    typer.Option(
        min=0,
        help="Draw so many texts beside the most probable one, and give that which is most like all of them (minimum "
        "Bayes risk by chrF): better texts for so many times the work. 8 is a good number; 0 for none.",
    ),
]
Minutes = Annotated[
    float,
    typer.Option(
        min=0.0, help="Time to look for better settings by whole trainings; what you set yourself stays. 0: train once."
    ),
]
Decoded = Annotated[
    int,
    typer.Option(min=0, help="Held-out texts that are decoded to choose λ by chrF; 0: by likelihood alone."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences in one call.")]
ShareTargets = Annotated[
    bool, typer.Option("--share-targets", help="Allow target texts to be shown to the owner of the PLM.")
]


class OptionGroup:
    """Options that several commands share: a command that takes one as an argument has all of its fields as options."""


@dataclass(frozen=True)
class ServerOptions(OptionGroup):
    """What the options say of the connection."""

    server: _Server = "http://127.0.0.1:8000"
    api_key: _ApiKey = None
    insecure: _Insecure = False
    ca: _Authority = None
    client_certificate: _ClientCertificate = None
    client_key: _ClientKey = None
    timeout: _Timeout = 600.0
    give_up_after: _GiveUpAfter = RETRY_FOR_SECONDS

    def connect(self, dtype: WireDtype = "float16") -> RemotePlm:
        """The PLM behind it."""
        return connect(
            self.server,
            dtype=dtype,
            api_key=self.api_key,
            insecure=self.insecure,
            ca=self.ca,
            client_certificate=self.client_certificate,
            client_key=self.client_key,
            timeout_s=self.timeout,
            give_up_after_s=self.give_up_after,
        )


@dataclass(frozen=True)
class DecodingOptions(OptionGroup):
    """What the options say of generating."""

    schedule: OptionalSchedule = None
    lambda_max: LambdaMax = None
    length_reward: LengthReward = None
    max_new_tokens: MaxNewTokens = DecodingSettings.max_new_tokens
    look_ahead: LookAhead = DecodingSettings.look_ahead
    batch_size: BatchSize = DecodingSettings.batch_size
    lookup: LookupFolder = None
    consensus: Consensus = 0
    dtype: Dtype = "float16"
    threads: Threads = 0

    @property
    def settings(self) -> DecodingSettings:
        """Length, look-ahead, batch size."""
        return DecodingSettings(self.max_new_tokens, self.look_ahead, self.batch_size)

    def drafts(self) -> NgramDrafter | None:
        """Where drafts are looked up."""
        return ngram_drafter_for(self.lookup) if self.lookup else None

    def identity(self, adapter: TrainedAdapter | None) -> list[object]:
        """What of these options can change a text."""
        return [self.interpolation(adapter), self.max_new_tokens, self.consensus, self.dtype]

    def interpolation(self, adapter: TrainedAdapter | None) -> Interpolation | None:
        """What training chose, but for what the user says; None for training's own choice.

        Raises:
            InvalidData: there is no adapter to interpolate with.
        """
        given = {"lambda_max": self.lambda_max, "length_reward": self.length_reward}
        given = {name: value for name, value in given.items() if value is not None}
        if self.schedule is None and not given:
            return None
        if adapter is None:
            raise InvalidData(
                "--schedule, --lambda-max and --length-reward say how an adapter is used.", hint="Give --adapter."
            )
        chosen = adapter.card.interpolation
        if self.schedule is None and self.lambda_max is None:
            return chosen.model_copy(update=given)
        # Another schedule than the chosen one starts from its own default, not from a λ_max chosen for this one.
        same = self.schedule in (None, chosen.schedule)
        base = chosen.model_copy(update={"gate": None}) if same else Interpolation(schedule=self.schedule or "gradual")
        return base.model_copy(update=given)


@dataclass(frozen=True)
class SamplingOptions(OptionGroup):
    """What the options say of sampling."""

    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    repetition_penalty: RepetitionPenalty = 1.0
    seed: Seed = 0
    samples: Samples = 1
    best: Best = 1
    known_only: KnownOnly = False

    def sampling(self, consensus: int) -> Sampling | None:
        """How to draw; None for the most probable tokens.

        Args:
            consensus: texts drawn for one.

        Raises:
            InvalidData: the options contradict each other.
        """
        if consensus and self.samples > 1:
            raise InvalidData("--consensus and --samples both say how many texts to draw.", hint="Give one of them.")
        texts = consensus + 1 if consensus else self.samples
        if self.best > texts:
            raise InvalidData(
                f"{self.best} best of {texts} were asked for.", hint="Give more --samples, or a --consensus of more."
            )
        temperature = self.temperature or (CONSENSUS_TEMPERATURE if consensus else 0.0)
        if temperature == 0.0 and self.samples > 1:
            raise InvalidData(
                "Without a temperature all samples are the same.", hint="Give --temperature, such as 0.8."
            )
        if temperature == 0.0 and self.repetition_penalty == 1.0:
            return None
        return Sampling(
            temperature, self.top_k, self.top_p, self.repetition_penalty, self.seed, known_only=self.known_only
        )


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of the groups that it takes as arguments."""
    signature = inspect.signature(command, eval_str=True)
    own, groups = list[inspect.Parameter](), dict[str, type[OptionGroup]]()
    for name, parameter in signature.parameters.items():
        if isinstance(parameter.annotation, type) and issubclass(parameter.annotation, OptionGroup):
            groups[name] = parameter.annotation
        else:
            own.append(parameter)
    fields = {name: inspect.signature(group, eval_str=True).parameters for name, group in groups.items()}

    @wraps(command)
    def run(**arguments: Any) -> None:
        made = {
            name: group(**{field: arguments.pop(field) for field in fields[name]}) for name, group in groups.items()
        }
        command(**arguments, **made)

    parameters = [*own, *(parameter for group in fields.values() for parameter in group.values())]
    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    vars(run)["__signature__"] = signature.replace(parameters=keyword_only)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in keyword_only}
    return run

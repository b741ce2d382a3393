"""Options that several commands of `pema-client` share. Settings that the library declares have theirs from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le
from cyclopts import Group, Parameter, Token

from data_owner_client.adapter.types import Schedule
from data_owner_client.data.reading.settings import ReadingSettings
from data_owner_client.decoding.settings import (
    DEFAULT_SAMPLING,
    MOST_LENGTH_PENALTY,
    DecodingSettings,
    Effort,
    SamplingSettings,
)
from data_owner_client.plm.connection.settings import ConnectionSettings
from data_owner_client.runtime.arguments import to_path
from data_owner_client.scoring.settings import ScoringSettings
from data_owner_client.training.settings import TrainingSettings
from protocol.errors import InvalidData
from protocol.types import WireDtype

if TYPE_CHECKING:
    from data_owner_client.adapter.interpolation import Interpolation
    from data_owner_client.adapter.trained import TrainedAdapter
    from data_owner_client.decoding.client_drafts import NgramDrafter
    from data_owner_client.decoding.search_options import SearchOptions
    from data_owner_client.memory.types import ContextMode
    from data_owner_client.plm.remote_plm import RemotePlm

DATA = Group("Data", sort_key=1)
GRID = Group("Grid", sort_key=2)
TRAINING = Group("Training", sort_key=3)
DECODING = Group("Decoding", sort_key=4)
SAMPLING = Group("Sampling", sort_key=5)
OUTPUT = Group("Output", sort_key=6)
CONNECTION = Group("Connection", sort_key=7)
DEFAULT_SERVER = "http://127.0.0.1:8000"


def _path(_: Any, tokens: Sequence[Token]) -> Path:
    return to_path(tokens[0].value)


# Shells leave the `~` of `--output=~/texts` as it is.
PathOption = Annotated[Path, Parameter(converter=_path)]
Server = Annotated[
    str,
    Parameter(
        help="Address of the PLM owner's server: http://, https://, grpc:// or grpcs://.",
        env_var="PEMA_SERVER",
        group=CONNECTION,
    ),
]
Connection = Annotated[ConnectionSettings, Parameter(name="*", group=CONNECTION)]
Training = Annotated[TrainingSettings, Parameter(name="*", group=TRAINING, negative_bool="no-")]
Decoding = Annotated[DecodingSettings, Parameter(name="*", group=DECODING, negative_bool="no-")]
Sampling = Annotated[SamplingSettings, Parameter(name="*", group=SAMPLING)]
Scoring = Annotated[ScoringSettings, Parameter(name="*", group=OUTPUT)]

AsJson = Annotated[bool, Parameter(name="--json", help="Print the result as JSON on standard output.", group=OUTPUT)]
Dtype = Annotated[
    WireDtype,
    Parameter(
        help="Number format of representations on the wire and on disk; int8 is half of float16.", group=CONNECTION
    ),
]
Threads = Annotated[
    int, Ge(0), Parameter(help="CPU threads of this client; 0 for all cores that it may use.", group=OUTPUT)
]
MemoryFolder = Annotated[PathOption, Parameter(help="Folder of the external memory.", group=DATA)]
AdapterFolder = Annotated[PathOption, Parameter(help="Folder of the adapter.", group=DATA)]
OptionalAdapter = Annotated[
    PathOption | None, Parameter(name="--adapter", help="Folder of the adapter. Default: the PLM alone.", group=DATA)
]
TaskName = Annotated[str, Parameter(help="Name of a built-in task, or a TOML file.", group=DATA, validator=None)]
InputFile = Annotated[
    PathOption | None,
    Parameter(
        name="--input",
        help="JSONL, JSON, CSV, TSV, Parquet, or text with one source a line; - is standard input.",
        group=DATA,
    ),
]
Sources = Annotated[
    PathOption | None, Parameter(help="Text file with one source a line; goes with --targets.", group=DATA)
]
Targets = Annotated[
    PathOption | None, Parameter(help="Text file with one target a line; goes with --sources.", group=DATA)
]
Reading = Annotated[ReadingSettings, Parameter(name="*", group=DATA)]
ShareTargets = Annotated[
    bool, Parameter(help="Allow target texts to be shown to the owner of the PLM.", group=CONNECTION)
]
ShareRedacted = Annotated[
    PathOption | None,
    Parameter(
        help="Show target texts with surrogates in place of what these rules find: a TOML file, or the module:function "
        "of a Python callable.",
        group=CONNECTION,
    ),
]
ShareEarlierAnswers = Annotated[
    bool,
    Parameter(
        help="Allow earlier answers of a conversation in the prompts for its later ones, which the owner of the PLM "
        "sees. Without it, only the first answer of each conversation is used, unless the targets are shared.",
        group=CONNECTION,
    ),
]
OutputFile = Annotated[
    PathOption | None,
    Parameter(name="--output", help="File for the texts, one a line. Default: standard output.", group=OUTPUT),
]
Stop = Annotated[
    list[str] | None,
    Parameter(
        help="Text before which a text ends; may be given several times. Default: the model's own end only.",
        negative=(),
        allow_leading_hyphen=True,
        group=DECODING,
    ),
]
Stream = Annotated[bool, Parameter(help="Show one text as it grows.", group=OUTPUT)]
Explain = Annotated[
    PathOption | None,
    Parameter(
        help="JSONL file for how every token was chosen: λ, its probabilities, the choices of PLM and adapter alone.",
        group=OUTPUT,
    ),
]
Samples = Annotated[int, Ge(1), Parameter(help="Texts drawn for every input.", group=SAMPLING)]
Best = Annotated[
    int, Ge(1), Parameter(help="Most probable ones of the drawn texts, or of the beams, to print.", group=SAMPLING)
]


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """Options of decoding that are not the library's `DecodingSettings`.

    Attributes:
        schedule: Schedule of λ. Default: the choice of training on the validation memory.
        lambda_max: λ_max of the schedule. Default: the choice of training, or 0.9.
        length_reward: Nats by which the end is less likely to be chosen; more make longer texts. Default: the choice
            of training.
        lookup: Memory whose targets are looked up for drafts. The owner of the PLM sees the drafts, so it must be a
            memory that was built with --share-targets.
        consensus: Draw this many extra texts, and print the one with the highest mean chrF against the others (minimum
            Bayes risk); 0 for none. 8 is a good number; the cost grows with it.
        beams: Search this many texts side by side for the most probable one; 1 for none. The cost grows with it.
            With an adapter the beams go through its candidates. Without one the whole LM head is fetched.
        length_penalty: Exponent of the length by which a beam's log-probability is divided; more prefers longer texts.
        effort: Search for the best text. low takes the most probable tokens, medium 4 --beams, high a --consensus of 8.
            Default: low.
    """

    schedule: Schedule | None = None
    lambda_max: Annotated[float, Ge(0), Le(1)] | None = None
    length_reward: Annotated[float, Ge(0), Le(20)] | None = None
    lookup: PathOption | None = None
    consensus: Annotated[int, Ge(0)] = 0
    beams: Annotated[int, Ge(1)] = 1
    length_penalty: Annotated[float, Ge(0), Le(MOST_LENGTH_PENALTY)] = 1.0
    effort: Effort | None = None

    def search(self, samples: int, best: int) -> SearchOptions:
        """The search for the texts of an input, with what the effort stands for.

        Args:
            samples: texts drawn for every input.
            best: texts printed for every input.

        Raises:
            InvalidData: the options contradict each other.
        """
        from data_owner_client.decoding.search_options import SearchOptions

        return SearchOptions(
            samples=samples,
            best=best,
            consensus=self.consensus,
            beams=self.beams,
            length_penalty=self.length_penalty,
        ).with_effort(self.effort)

    def drafter(self) -> NgramDrafter | None:
        """The drafter that looks drafts up, if any."""
        from data_owner_client.decoding.generation import ngram_drafter_for

        return ngram_drafter_for(self.lookup) if self.lookup else None

    def interpolation(self, adapter: TrainedAdapter | None) -> Interpolation | None:
        """The choice of training, with what the user set instead; None for exactly the choice of training.

        Raises:
            InvalidData: there is no adapter to interpolate with.
        """
        changes = (self.schedule, self.lambda_max, self.length_reward)
        if changes == (None, None, None):
            return None
        if adapter is None:
            raise InvalidData(
                "--schedule, --lambda-max and --length-reward say how an adapter is used.", hint="Give --adapter."
            )
        return adapter.card.interpolation.changed(*changes)


MoreDecoding = Annotated[DecodingOptions, Parameter(name="*", group=DECODING)]
DEFAULT_OPTIONS = DecodingOptions()


def chosen_context(context: ContextMode | None, *, share_targets: bool, share_redacted: Path | None) -> ContextMode:
    """The contexts of a memory: those that are named, or else those that the consent allows.

    Raises:
        InvalidData: the options contradict each other.
    """
    if share_redacted is None:
        return context or ("teacher-forced" if share_targets else "private")
    if share_targets:
        raise InvalidData(
            "--share-targets shows all of the targets, and --share-redacted keeps parts of them back.",
            hint="Say one of them.",
        )
    return context or "redacted"


def connected(server: str, connection: ConnectionSettings, dtype: WireDtype = "float16") -> RemotePlm:
    """The PLM of a server."""
    from data_owner_client.plm.connect import connect

    # Compose files set to nothing what the user has not set.
    return connect(server.strip() or DEFAULT_SERVER, connection, dtype=dtype)


def sampling_of(sampling: SamplingSettings, search: SearchOptions) -> SamplingSettings | None:
    """The settings of sampling; None for the most probable tokens.

    Args:
        sampling: settings of the command line.
        search: search for the texts of an input.

    Raises:
        InvalidData: the options contradict each other.
    """
    from dataclasses import replace

    from data_owner_client.decoding.options import CONSENSUS_TEMPERATURE

    temperature = sampling.temperature or (CONSENSUS_TEMPERATURE if search.consensus else 0.0)
    chosen = None
    if temperature or sampling.repetition_penalty != 1.0:
        chosen = replace(sampling, temperature=temperature)
    search.require_possible(chosen)
    if chosen is None:
        _require_no_limits_of_draws(sampling, search)
    return chosen


def _require_no_limits_of_draws(sampling: SamplingSettings, search: SearchOptions) -> None:
    for name in ("top_p", "top_k", "candidates_only"):
        if getattr(sampling, name) != getattr(DEFAULT_SAMPLING, name):
            flag = f"--{name.replace('_', '-')}"
            if search.beams > 1:
                raise InvalidData(f"{flag} limits what is drawn, and a beam search draws none.", hint="Leave it away.")
            raise InvalidData(
                f"{flag} limits what is drawn, and without a temperature nothing is drawn.",
                hint=f"Give --temperature, such as 0.8, or leave {flag} away.",
            )

"""Options of a generation: their defaults, their checks, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypedDict

from data_owner_client.adapter.bounds import DEFAULT_REPETITION_LIMIT
from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.data.answer_form import AnswerForm
from data_owner_client.data.stops import Stops
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.client_drafts import NgramDrafter
from data_owner_client.decoding.decode_loop import PLM_ONLY, GenerationConfig
from data_owner_client.decoding.failures import OnFailure
from data_owner_client.decoding.search_options import SearchOptions
from data_owner_client.decoding.settings import DEFAULT_DECODING, DecodingSettings, Effort, SamplingSettings
from data_owner_client.runtime.progress import Reporter
from protocol.errors import InvalidData
from protocol.head import LMHead

CONSENSUS_TEMPERATURE = 0.6
"""Temperature of a consensus's draws: sharper than the mixture, so that few draws do as well as many."""

OnToken = Callable[[int, int], None]
"""Called with the index of a text and the id of a token."""
OnText = Callable[[int, str], None]
"""Called with the index of a text and its beginning so far, which is final."""


class GenerationOptions(TypedDict, total=False):
    """Options of a generation; each may be omitted.

    Attributes:
        interpolation: schedule or gate of λ; None for the one that training chose.
        decoding: length, bounds, look-ahead and batch size.
        form: form that all answers are held to; None for the task's schema, as `decoding.hold` says.
        stop: text, or several, before which a text ends, beside the other stops; None for no more.
        prefix: ids of the tokens with which every answer begins; it goes on from there.
        alternatives: most probable tokens of each side to record at each position; 0 for none.
        lookup: drafter from a memory's targets (`ngram_drafter_for`); the PLM's owner sees its drafts. None for none.
        sampling: settings of sampling; None for the most probable tokens. The text depends on the seed, not on drafts.
        head: all rows of the LM head in float32, for draws from the whole vocabulary and beams over it; None to fetch
            them where needed.
        samples: texts to draw for each input.
        best: texts to return for each input, the most probable of `samples` or `beams` first.
        consensus: texts to draw for each input beside the most probable one. All are ranked by their likeness to one
            another (`decoding.mbr`). It replaces `samples`, and uses `CONSENSUS_TEMPERATURE` without `sampling`. With
            an adapter only candidates are drawn, which needs no whole LM head. 0 for no consensus.
        beams: beams of a beam search for each input (`decoding.beams`); 1 takes the most probable tokens. With an
            adapter beams go through candidates alone, unless `head` is given; without one they need the whole LM head.
        length_penalty: exponent of the length by which a beam's log-probability is divided; 0 ranks by the whole text's
            probability, more prefers longer texts.
        effort: `low` takes the most probable tokens, `medium` 4 beams, `high` a consensus of 8 draws; None for what the
            other options say.
        on_failure: called for each text that cannot be answered, whose result is then empty. None to raise the error.
        on_token: called for every token as soon as it is final; None for no call.
        on_text: called whenever the beginning of a text may have grown that is final; None for no call. What may become
            a stop or a repetition is left out. Of several texts for an input, this is the first one drawn.
        reporter: shows the progress; None for none.
    """

    interpolation: Interpolation | None
    decoding: DecodingSettings
    form: AnswerForm | None
    stop: str | Iterable[str] | None
    prefix: Sequence[int]
    alternatives: int
    lookup: NgramDrafter | None
    sampling: SamplingSettings | None
    head: LMHead | None
    samples: int
    best: int
    consensus: int
    beams: int
    length_penalty: float
    effort: Effort | None
    on_failure: OnFailure | None
    on_token: OnToken | None
    on_text: OnText | None
    reporter: Reporter | None


@dataclass(frozen=True)
class ChosenOptions:
    """The options with their defaults."""

    interpolation: Interpolation | None = None
    decoding: DecodingSettings = DEFAULT_DECODING
    form: AnswerForm | None = None
    stop: str | Iterable[str] | None = ()
    prefix: Sequence[int] = ()
    alternatives: int = 0
    lookup: NgramDrafter | None = None
    sampling: SamplingSettings | None = None
    head: LMHead | None = None
    samples: int = 1
    best: int = 1
    consensus: int = 0
    beams: int = 1
    length_penalty: float = 1.0
    effort: Effort | None = None
    on_failure: OnFailure | None = None
    on_token: OnToken | None = None
    on_text: OnText | None = None
    reporter: Reporter | None = None

    def __post_init__(self) -> None:
        self.search.require_possible(self.sampling)
        if self.search.beams > 1:
            self._require_searchable()

    @cached_property
    def search(self) -> SearchOptions:
        """The search for the texts, with what the effort stands for.

        Raises:
            InvalidData: the effort is unknown, or the options name another search.
        """
        return SearchOptions(
            samples=self.samples,
            best=self.best,
            consensus=self.consensus,
            beams=self.beams,
            length_penalty=self.length_penalty,
        ).with_effort(self.effort)

    def _require_searchable(self) -> None:
        """Refuse options that a beam search cannot honour.

        Raises:
            InvalidData: there is such an option.
        """
        if self.on_text is not None or self.on_token is not None:
            raise InvalidData(
                "A text is shown as it grows, and of several beams the best is known at the end.",
                hint="Leave --stream away, or --beams and --effort.",
            )
        if self.lookup is not None:
            raise InvalidData(
                "--lookup finds drafts, and a beam search has none.", hint="Leave it away, or --beams and --effort."
            )
        if self.form is not None:
            raise InvalidData(
                "Answers are held to a form, and a beam search does not search held ones.",
                hint="Say --effort high or --consensus, decode with --no-hold, or leave --beams and --effort away.",
            )

    def require_scored_labels(self) -> None:
        """Refuse options of decoded texts, for a task whose labels are scored.

        Raises:
            InvalidData: there is such an option.
        """
        unfit = {
            "--effort": self.effort not in (None, "low"),
            "--beams": self.beams > 1,
            "--consensus": self.consensus,
            "--samples": self.samples > 1,
            "--best": self.best > 1,
            "--temperature": self.sampling is not None and self.sampling.temperature and not self.search.consensus,
            "--lookup": self.lookup is not None,
            "--stream": self.on_text is not None or self.on_token is not None,
            "--stop": self.stop,
            "The option prefix": self.prefix,
            "--hold" if self.decoding.hold else "--no-hold": self.decoding.hold is not None,
            "The option form": self.form,
        }
        if names := [name for name, value in unfit.items() if value]:
            raise InvalidData(
                f"{' and '.join(names)} cannot be used with a classify task: its labels are scored, not generated.",
                hint="Leave it away; the probabilities of all labels are in --json and in `label_probabilities`.",
            )

    def config(
        self, adapter: CandidateDistribution | None, stops: Stops, sampling: SamplingSettings | None
    ) -> GenerationConfig:
        """The configuration of the decode loop.

        Args:
            adapter: the data owner's adapter; None for the PLM alone.
            stops: ends of the texts, without those of the options.
            sampling: settings of sampling, from `draws`.
        """
        return GenerationConfig(
            adapter=adapter,
            interpolation=self.interpolation_with(adapter),
            stops=stops.with_texts([self.stop] if isinstance(self.stop, str) else self.stop or ()),
            repetition_limit=self._repetition_limit(adapter),
            settings=self.decoding,
            sampling=sampling,
            head=self.head,
            lookup=self.lookup,
            beams=self.search.beams,
        )

    def answer_form(self, task: Task | None) -> AnswerForm | None:
        """The form that answers are held to; None for free answers.

        Args:
            task: task of the answers; None for bare prompts.

        Raises:
            InvalidData: answers shall be held, and there is no form.
        """
        hold, schema = self.decoding.hold, None if task is None else task.answer_schema
        if self.form is not None or hold is False:
            return self.form
        if schema is not None:
            return AnswerForm(schema)
        if hold:
            raise InvalidData(
                "--hold needs the form of the answers, and there is none.",
                hint='Give the task kind = "extract" and an answer_schema, or leave --hold away.',
            )
        return None

    def length_bound(self, adapter: CandidateDistribution, source_tokens: int) -> int | None:
        """The longest plausible answer to a source text, in tokens; None for no bound."""
        wanted, bounds = self.decoding.length_bound, adapter.card.bounds
        bounded = wanted or (wanted is None and self._uses(adapter))
        return bounds.max_tokens(source_tokens) if bounded and bounds else None

    def _repetition_limit(self, adapter: CandidateDistribution | None) -> int | None:
        """Repeated tokens at which a text ends; None for any number."""
        wanted, bounds = self.decoding.repetition_bound, adapter.card.bounds if adapter else None
        # The texts of an old card, which has no bounds, stay as they are.
        if wanted or (wanted is None and bounds is not None and self._uses(adapter)):
            return bounds.repetition_limit if bounds else DEFAULT_REPETITION_LIMIT
        return None

    def interpolation_with(self, adapter: CandidateDistribution | None) -> Interpolation:
        """The chosen mixture, or else the adapter's own."""
        return self.interpolation or (adapter.card.interpolation if adapter else PLM_ONLY)

    def _uses(self, adapter: CandidateDistribution | None) -> bool:
        """Return False if the PLM generates the texts alone."""
        return adapter is not None and not self.interpolation_with(adapter).finished(0, 1.0)

    def draws(self, adapter: CandidateDistribution | None) -> tuple[list[int | None], SamplingSettings | None]:
        """The sample numbers of each input's continuations (see `GenerationRequest.sample`), and their sampling."""
        if not self.search.consensus:
            return list(range(self.samples)), self.sampling
        sampling = self.sampling or SamplingSettings(temperature=CONSENSUS_TEMPERATURE)
        return [None, *range(self.search.consensus)], replace(sampling, candidates_only=adapter is not None)

"""Options of the search for the texts of an input: draws, consensus and beams, and the effort that stands for them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from data_owner_client.decoding.settings import MOST_LENGTH_PENALTY, Effort, SamplingSettings
from protocol.errors import InvalidData


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Options of the search for the texts of an input. As they are, the most probable tokens are taken.

    Attributes:
        samples: texts to draw.
        best: texts to return.
        consensus: texts to draw beside the most probable one; 0 for no consensus.
        beams: beams of a beam search; 1 for none.
        length_penalty: exponent of the length in the scores of beams.
    """

    samples: int = 1
    best: int = 1
    consensus: int = 0
    beams: int = 1
    length_penalty: float = 1.0

    def with_effort(self, effort: Effort | None) -> SearchOptions:
        """The options that an effort stands for; None to keep these.

        Raises:
            InvalidData: the effort is unknown, or the options name another search.
        """
        if effort is None:
            return self
        if effort not in EFFORTS:
            raise InvalidData(f"effort is {effort!r}.", hint=f"It must be one of {', '.join(EFFORTS)}.")
        others = {"--samples": self.samples > 1, "--consensus": self.consensus, "--beams": self.beams > 1}
        if names := [name for name, given in others.items() if given]:
            raise InvalidData(
                f"--effort and {' and '.join(names)} both say how texts are searched.", hint="Give one of them."
            )
        beams, consensus = EFFORTS[effort]
        return replace(self, beams=beams, consensus=consensus)

    def require_possible(self, sampling: SamplingSettings | None) -> None:
        """Refuse options that contradict each other.

        Args:
            sampling: settings of sampling; None for the most probable tokens.

        Raises:
            InvalidData: they do, or a number is out of its bounds.
        """
        for name, least in (("samples", 1), ("best", 1), ("consensus", 0), ("beams", 1)):
            if (count := getattr(self, name)) < least:
                raise InvalidData(f"{name} is {count!r}.", hint=f"It must be ≥ {least}.")
        if self.consensus and self.samples > 1:
            raise InvalidData("--consensus and --samples both say how many texts to draw.", hint="Give one of them.")
        self._require_possible_beams(sampling)
        texts = self.consensus + 1 if self.consensus else max(self.samples, self.beams)
        if self.best > texts:
            raise InvalidData(
                f"{self.best} best of {texts} were asked for.",
                hint="Give more --samples or --beams, or a --consensus of more. Of a classify task, --json has all "
                "labels.",
            )
        if self.samples > 1 and not (sampling and sampling.temperature):
            raise InvalidData(
                "Without a temperature all samples are the same.", hint="Give --temperature, such as 0.8."
            )

    def _require_possible_beams(self, sampling: SamplingSettings | None) -> None:
        if not 0.0 <= self.length_penalty <= MOST_LENGTH_PENALTY:
            raise InvalidData(
                f"length_penalty is {self.length_penalty!r}.", hint=f"It must be from 0 to {MOST_LENGTH_PENALTY:g}."
            )
        if self.beams == 1:
            if self.length_penalty != 1.0:
                raise InvalidData(
                    "A length penalty ranks beams, and there are none.",
                    hint="Give --beams, such as 4, or --effort medium.",
                )
            return
        if self.consensus:
            raise InvalidData("--beams and --consensus are two ways to search.", hint="Give one of them.")
        if self.samples > 1 or sampling is not None:
            raise InvalidData(
                "A beam search compares the most probable texts and draws none.",
                hint="Leave --beams and --effort away, or --samples, --temperature and --repetition-penalty.",
            )


EFFORTS: dict[Effort, tuple[int, int]] = {"low": (1, 0), "medium": (4, 0), "high": (1, 8)}
"""Beams and draws of each effort."""

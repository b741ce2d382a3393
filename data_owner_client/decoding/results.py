"""The result of a generation: answers with their scores."""

from __future__ import annotations

from dataclasses import dataclass, replace

from data_owner_client.decoding.stats import GenerationStats
from data_owner_client.decoding.token_choice import TokenChoice


@dataclass(frozen=True)
class Generation:
    """Generated texts, in the order of the inputs.

    Attributes:
        best: for each input the requested texts, the most probable first, or by consensus the most agreed first. Of
            beams there may be fewer, if too few tokens can follow. Of a `classify` task all labels.
        choices: tokens of the first text of each input, with their scores.
        stats: counts and times.
        seconds: duration of the whole.
        label_probabilities: of a `classify` task, the probability of each label for each input, most probable first;
            empty for inputs without an answer. None for the other tasks.
    """

    best: list[list[str]]
    choices: list[list[TokenChoice]]
    stats: GenerationStats
    seconds: float
    label_probabilities: list[dict[str, float]] | None = None

    @property
    def texts(self) -> list[str]:
        """The first text of each input."""
        return [texts[0] for texts in self.best]

    def stripped(self) -> Generation:
        """A copy whose texts have no surrounding space."""
        return replace(self, best=[[text.strip() for text in texts] for texts in self.best])

    @property
    def token_ids(self) -> list[list[int]]:
        """Token ids of the first text of each input."""
        return [[choice.token for choice in choices] for choices in self.choices]

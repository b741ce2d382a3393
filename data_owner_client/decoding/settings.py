"""Settings of decoding and of sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le, Lt, Unit

from data_owner_client.runtime.declared_settings import require_in_bounds


@dataclass(frozen=True, kw_only=True)
class DecodingSettings:
    """Settings of decoding. Only `max_new_tokens`, the two bounds and `hold` can change a text.

    Attributes:
        max_new_tokens: Longest answer, in tokens.
        length_bound: End an answer that is much longer than the targets of the adapter's memory are for such a source.
            Default: where an adapter is used.
        repetition_bound: End a text that repeats itself, where the repetition began. Default: where an adapter is used.
        look_ahead: Tokens that the server drafts per call; never changes the text. Default: two, or the client's own
            drafts where these are likelier to be accepted.
        batch_size: Sequences in one call; one that ends makes room for the next.
        hold: Hold answers to the task's `answer_schema`. Default: where the task has one.
        label_tolerance: Of a `classify` task, largest error of a label's probability. The most probable label is exact.
            0 sends all labels behind each text, so that the calls do not depend on the answers. Default: 0.001, or 0.9
            where `apply` prints no probabilities and in `compare`, which takes a fifth of the tokens.
    """

    max_new_tokens: Annotated[int, Ge(1), Unit("tokens")] = 128
    length_bound: bool | None = None
    repetition_bound: bool | None = None
    look_ahead: Annotated[int, Ge(0), Unit("tokens")] | None = None
    batch_size: Annotated[int, Ge(1), Unit("sequences")] = 32
    hold: bool | None = None
    label_tolerance: Annotated[float | None, Ge(0), Lt(1)] = None

    def __post_init__(self) -> None:
        require_in_bounds(self)

    @property
    def bounds_of_texts(self) -> tuple[int, bool | None, bool | None, bool | None]:
        """The settings that can change a text."""
        return self.max_new_tokens, self.length_bound, self.repetition_bound, self.hold


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Settings of drawing tokens.

    Attributes:
        temperature: Temperature by which log-probabilities are divided before a token is drawn; 0 takes the most
            probable token.
        top_p: Draw from the fewest most probable tokens that together have this probability.
        top_k: Draw from this many most probable tokens; 0 for all.
        repetition_penalty: Factor on the log-probabilities of tokens that occurred already; more than 1 makes them less
            probable.
        seed: Seed of all draws.
        candidates_only: Draw only from the adapter's candidates and the PLM's most probable token, which needs no whole
            LM head.
    """

    temperature: Annotated[float, Ge(0), Lt(math.inf)] = 0.0
    top_p: Annotated[float, Ge(0), Le(1)] = 1.0
    top_k: Annotated[int, Ge(0), Unit("tokens")] = 0
    repetition_penalty: Annotated[float, Ge(1)] = 1.0
    seed: Annotated[int, Ge(0), Le(2**63 - 1)] = 0
    candidates_only: bool = False

    def __post_init__(self) -> None:
        require_in_bounds(self)


LABEL_TOLERANCE = 1e-3
"""Largest error of a label's probability, where the settings name none."""
LABELS_ALONE_TOLERANCE = 0.9
"""Tolerance of probabilities that nobody sees. With the embedded models, larger ones took more tokens again."""
Effort = Literal["low", "medium", "high"]
"""Effort of the search for the best text."""
MOST_LENGTH_PENALTY = 10.0
"""Largest exponent of the length in the scores of beams."""
DEFAULT_DECODING = DecodingSettings()
DEFAULT_SAMPLING = SamplingSettings()

"""What the service expects of an engine: one batch in, tensors on the CPU out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Literal, Protocol, Self, get_args

from torch import Tensor

from protocol.head import LMHead
from protocol.types import CrKind


@dataclass(frozen=True)
class EngineInfo:
    """What an engine knows of its model.

    Attributes:
        hidden_size: D, the width of the LM head's input.
        vocab_size: V, rows of the LM head.
        max_tokens: longest sequence the model was made for; None if it does not say.
        dtype: name of the dtype of the weights.
        eos_token_ids: tokens after which the model itself would stop.
    """

    hidden_size: int
    vocab_size: int
    max_tokens: int | None
    dtype: str
    cr_kind: CrKind
    eos_token_ids: tuple[int, ...]


PassKind = Literal["encode", "prompt", "step"]


@dataclass
class PassStats:
    """Forward passes of one kind.

    Attributes:
        number: of passes.
        tokens: that were run in them.
        places: that were computed, padding included.
    """

    number: int = 0
    tokens: int = 0
    places: int = 0


@dataclass
class EngineStats:
    """What an engine has done since it was made. Its own thread counts; others may look at any time.

    Attributes:
        passes: of sequences to encode, of prompts to go on from, and of one more token of sequences that are drafted.
        known_tokens: tokens that were not run, as their attention states were known.
        kept_bytes: size of the attention states that are kept.
    """

    passes: dict[PassKind, PassStats] = field(
        default_factory=lambda: {kind: PassStats() for kind in get_args(PassKind)}
    )
    known_tokens: int = 0
    kept_bytes: int = 0

    def note(self, kind: PassKind, tokens: int, places: int) -> None:
        """Count a pass."""
        passes = self.passes[kind]
        passes.number += 1
        passes.tokens += tokens
        passes.places += places


@dataclass(frozen=True)
class Encoded:
    """Representations of one batch, sequence by sequence. N = Σ rows.

    Attributes:
        rows: rows of each sequence.
        echo: CRC-32 of the token ids that were really run, a sequence each.
        cr_N_D: context representations, float32 or the model's dtype, on the CPU.
        last_hidden_N_D: the head's input, only where `cr_N_D` is something else.
        logsumexp_N: log Σ_v exp(logit_v) in float32, if asked for.
    """

    rows: list[int]
    echo: list[int]
    cr_N_D: Tensor
    last_hidden_N_D: Tensor | None
    logsumexp_N: Tensor | None

    def split(self, counts: Sequence[int]) -> list[Self]:
        """One part for each run of so many sequences."""
        ends = list(accumulate(counts))
        row_ends = [0, *accumulate(self.rows)]
        parts = []
        for start, end in zip([0, *ends], ends, strict=False):
            columns = {
                column.name: value[row_ends[start] : row_ends[end]]
                for column in fields(self)
                if isinstance(value := getattr(self, column.name), Tensor)
            }
            parts.append(replace(self, rows=self.rows[start:end], echo=self.echo[start:end], **columns))
        return parts


@dataclass(frozen=True)
class Decoded(Encoded):
    """The positions wanted of each sequence and those drafted after it.

    Attributes:
        top1_N: int64, most probable next token of each position, and so the draft that the next position is built on.
        top1_logprob_N: its log-probability, float32.
    """

    top1_N: Tensor
    top1_logprob_N: Tensor


@dataclass(frozen=True, eq=False)
class EncodeBatch:
    """Sequences to encode in one pass.

    Attributes:
        token_ids: the sequences.
        from_position: first position wanted of each.
        with_logsumexp: also the log-sum-exp.
        tenant: who asks; what is known of a text is known to its tenant alone.
    """

    token_ids: list[list[int]]
    from_position: list[int]
    with_logsumexp: bool = False
    tenant: str = ""

    @property
    def tokens(self) -> int:
        """Tokens that the engine may have to run, padding included."""
        return len(self.token_ids) * max(map(len, self.token_ids))


@dataclass(frozen=True, eq=False)
class DraftBatch:
    """Sequences to draft on.

    Attributes:
        token_ids: the sequences.
        from_position: first position wanted of each.
        look_ahead: the most tokens to draft after each.
        stop_token_ids: after which a sequence ends.
        tenant: who asks.
    """

    token_ids: list[list[int]]
    from_position: list[int]
    look_ahead: list[int]
    stop_token_ids: frozenset[int] = frozenset()
    tenant: str = ""

    @property
    def width(self) -> int:
        """Tokens that its longest sequence may come to have."""
        return max(map(len, self.token_ids)) + max(self.look_ahead)

    @property
    def tokens(self) -> int:
        """Tokens that it may come to hold, padding included, if it is drafted alone."""
        return len(self.token_ids) * self.width


class Drafting(Protocol):
    """Sequences that are drafted together, one token of each a step; batches join and leave between any two steps."""

    def join(self, batches: Sequence[DraftBatch]) -> int:
        """Take batches in, and run their prompts as far as they are not known; the number of tokens run."""

    def step(self) -> list[tuple[DraftBatch, Decoded]]:
        """Draft one more token of every sequence that goes on; what has become of batches of which none does."""

    def leave(self, batch: DraftBatch) -> None:
        """Let go of a batch that nobody waits for any more."""


class Engine(Protocol):
    """Runs a causal language model. Calls come one at a time but for the first two; every one is stateless."""

    info: EngineInfo
    head: LMHead
    counts: EngineStats

    def is_alive(self) -> bool:
        """Whether it can still work, as far as that can be told without work. Any thread may call it."""

    def forget_unused(self) -> None:
        """Drop what is known of texts that were not asked about for long. Any thread may call it."""

    def warm_up(self) -> None:
        """Run a real forward pass and check the head against the model's own logits."""

    def encode(self, batch: EncodeBatch) -> Encoded:
        """Representations of all positions ≥ `from_position` of every sequence."""

    def drafting(self, batch_tokens: int) -> Drafting:
        """Drafting that nothing has joined yet.

        Args:
            batch_tokens: the most tokens, padding included, in one forward pass.
        """

"""The interface that the service expects of an engine: a batch in, tensors on the CPU out."""

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
    """Description of the model that an engine runs.

    Attributes:
        hidden_size: D, the width of the LM head's input.
        vocab_size: V, the number of rows of the LM head.
        max_tokens: longest sequence that the model was made for; None if its configuration states none.
        dtype: name of the dtype of the weights, such as `bfloat16`.
        cr_kind: representation that the engine returns.
        eos_token_ids: tokens after which the model itself would stop.
    """

    hidden_size: int
    vocab_size: int
    max_tokens: int | None
    dtype: str
    cr_kind: CrKind
    eos_token_ids: tuple[int, ...]


PassKind = Literal["encode", "prompt", "step"]
"""Forward passes over sequences to encode, over prompts to draft from, and over one more token of drafted sequences."""


@dataclass
class PassStats:
    """Statistics of the forward passes of one kind.

    Attributes:
        count: number of passes.
        tokens: tokens run in them, without padding.
        padded_tokens: tokens run in them, padding included.
    """

    count: int = 0
    tokens: int = 0
    padded_tokens: int = 0


@dataclass
class EngineStats:
    """Statistics of an engine since it was made. The engine's thread writes them; any thread may read them.

    Attributes:
        passes: statistics of the forward passes, by kind.
        cached_tokens: tokens that were not run because their attention states were cached.
        cached_bytes: present size of the cached attention states, in bytes.
    """

    passes: dict[PassKind, PassStats] = field(
        default_factory=lambda: {kind: PassStats() for kind in get_args(PassKind)}
    )
    cached_tokens: int = 0
    cached_bytes: int = 0

    def reset(self) -> None:
        """Start the counts again from zero."""
        self.passes = {kind: PassStats() for kind in get_args(PassKind)}
        self.cached_tokens = 0
        self.cached_bytes = 0

    def record(self, kind: PassKind, tokens: int, padded_tokens: int) -> None:
        """Count a pass."""
        passes = self.passes[kind]
        passes.count += 1
        passes.tokens += tokens
        passes.padded_tokens += padded_tokens


@dataclass(frozen=True)
class Encoded:
    """Representations of one batch, sequence by sequence. N = Σ rows.

    Attributes:
        rows: number of rows of each sequence.
        echo: CRC-32 of each sequence's token ids as the model received them.
        cr_N_D: context representations, float32 or the model's dtype, on the CPU.
        last_hidden_N_D: the head's input; None where that is `cr_N_D` itself.
        logsumexp_N: log Σ_v exp(logit_v), float32; None unless requested.
    """

    rows: list[int]
    echo: list[int]
    cr_N_D: Tensor
    last_hidden_N_D: Tensor | None
    logsumexp_N: Tensor | None

    def split(self, counts: Sequence[int]) -> list[Self]:
        """Divide into parts of consecutive sequences, `counts[i]` sequences in part i."""
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
    """Representations of each sequence's requested positions and of the tokens drafted after it.

    Attributes:
        top1_N: int64, the most probable next token of each position; the draft at the following position.
        top1_logprob_N: log-probability of that token, float32.
    """

    top1_N: Tensor
    top1_logprob_N: Tensor


@dataclass(frozen=True, eq=False)
class EncodeBatch:
    """Sequences to encode in one pass.

    Attributes:
        token_ids: token ids of each sequence.
        from_position: first requested position of each sequence.
        with_logsumexp: whether to return the log-sum-exp.
        tenant: the tenant that asks; cached states are never shared between tenants.
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
    """Sequences to draft from.

    Attributes:
        token_ids: token ids of each sequence.
        from_position: first requested position of each sequence.
        look_ahead: largest number of tokens to draft after each sequence.
        stop_token_ids: tokens after which a sequence ends.
        tenant: the tenant that asks; cached states are never shared between tenants.
    """

    token_ids: list[list[int]]
    from_position: list[int]
    look_ahead: list[int]
    stop_token_ids: frozenset[int] = frozenset()
    tenant: str = ""

    @property
    def width(self) -> int:
        """Bound on the length of its longest sequence with all drafts."""
        return max(map(len, self.token_ids)) + max(self.look_ahead)

    @property
    def tokens(self) -> int:
        """Bound on the tokens that it holds if it is drafted alone, padding included."""
        return len(self.token_ids) * self.width


class Drafting(Protocol):
    """Sequences that are drafted together, one token each per step. Batches join and leave between any two steps."""

    def join(self, batches: Sequence[DraftBatch]) -> int:
        """Add batches and run the parts of their prompts that are not cached. Return the number of tokens run."""

    def step(self) -> list[tuple[DraftBatch, Decoded]]:
        """Draft one token for every unfinished sequence. Return the batches that are now complete, with results."""

    def leave(self, batch: DraftBatch) -> None:
        """Remove a batch whose client has disconnected."""


class Engine(Protocol):
    """A causal language model that can be run. Calls are stateless.

    One thread makes all calls, except `is_alive` and `evict_idle`, which any thread may make.

    Attributes:
        info: description of the model.
        head: the model's LM head.
        stats: statistics of what was run.
    """

    info: EngineInfo
    head: LMHead
    stats: EngineStats

    def is_alive(self) -> bool:
        """Return whether the engine can still work. Must not run the model."""

    def evict_idle(self) -> None:
        """Remove cached states that have passed the cache's time limit."""

    def reset(self) -> None:
        """Remove all cached states, and start the statistics again."""

    def warm_up(self) -> None:
        """Run a real forward pass and check its result."""

    def encode(self, batch: EncodeBatch) -> Encoded:
        """Representations of all positions ≥ `from_position` of every sequence."""

    def drafting(self, batch_tokens: int) -> Drafting:
        """A new, empty `Drafting`.

        Args:
            batch_tokens: largest number of tokens in one forward pass, padding included.
        """

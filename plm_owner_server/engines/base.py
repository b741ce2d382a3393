"""What the service expects of an engine: one batch in, tensors on the CPU out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Protocol, Self

from torch import Tensor

from protocol.head import LMHead
from protocol.messages import CrKind


@dataclass(frozen=True)
class EngineInfo:
    """What an engine knows of its model.

    Attributes:
        hidden_size: D, the width of the LM head's input.
        vocab_size: V, rows of the LM head.
        max_tokens: longest sequence the model was made for; None if it does not say.
        dtype: name of the dtype of the weights.
        attention_window: tokens that the narrowest attention layer sees; None if all layers see everything.
        eos_token_ids: tokens after which the model itself would stop.
    """

    hidden_size: int
    vocab_size: int
    max_tokens: int | None
    dtype: str
    cr_kind: CrKind
    attention_window: int | None
    eos_token_ids: tuple[int, ...]


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
                field.name: value[row_ends[start] : row_ends[end]]
                for field in fields(self)
                if isinstance(value := getattr(self, field.name), Tensor)
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


class Draft(Protocol):
    """Drafting that has begun: the prompts have run."""

    @property
    def sequences(self) -> int:
        """How many are still being drafted."""

    def step(self) -> bool:
        """Draft one more token of every sequence that goes on; false once none does."""

    def result(self) -> Decoded:
        """All positions so far, sequence by sequence."""


class Engine(Protocol):
    """Runs a causal language model. Calls come one at a time; every one is stateless."""

    info: EngineInfo
    head: LMHead

    def warm_up(self) -> None:
        """Run a real forward pass and check the head against the model's own logits."""

    def encode(
        self, token_ids: Sequence[Sequence[int]], from_position: Sequence[int], *, with_logsumexp: bool
    ) -> Encoded:
        """Representations of all positions ≥ `from_position` of every sequence."""

    def draft(
        self,
        token_ids: Sequence[Sequence[int]],
        from_position: Sequence[int],
        look_ahead: Sequence[int],
        stop_token_ids: frozenset[int],
    ) -> Draft:
        """All positions ≥ `from_position` of every sequence, and up to `look_ahead` greedily drafted ones.

        Sequences of different lengths may only come together while prompt and drafts fit into `attention_window`:
        drafts follow the padding, and padding inside a sliding window would push real tokens out of it.
        """

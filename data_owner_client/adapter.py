"""The adapter: a few low-rank matrices that turn the PLM's representation into the data owner's distribution.

P_PEMA(· | c) = softmax(head(h_pd)) over the candidate vocabulary V' ⊂ V, the tokens that occur in the memory's targets.

`paper`: h_pd = B_pd A f.
`residual`: h_pd = f + B_pd A f, which starts as the PLM itself.
`recent`: h_pd = f + B_pd (A f + E e) with e the head rows of the two target tokens before this one. It makes up for
what f does not know: in private memories it is that of the PLM's own continuation, often after other words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from torch import Tensor, nn

from data_owner_client.candidates import places
from data_owner_client.data import Pair, digest_pairs, read_written_pairs, write_pairs
from data_owner_client.decoding.interpolation import Interpolation
from data_owner_client.files import write_atomically
from data_owner_client.memory.store import ContextMode, ModelIdentity
from data_owner_client.nearest import NearestPairs
from data_owner_client.tasks import Task
from protocol.codec import unpacked
from protocol.errors import InvalidData
from protocol.head import LMHead

AdapterForm = Literal["paper", "residual", "recent"]
RECENT = 2
"""Tokens before the current one that the form `recent` sees."""
_JSON, _TENSORS, _PAIRS = "adapter.json", "adapter.safetensors", "pairs.jsonl"


class Adapter(nn.Module):
    """A ∈ R^{R×D}, B_pd ∈ R^{D×R} (prediction) and B_rct ∈ R^{D×R} (reconstruction), all float32.

    Representations are divided by `rms`, their root mean square over the memory, so that one learning rate suits every
    model; the product is scaled back, so that the head sees its own scale.

    Args:
        hidden_size: D.
        rank: R.
        form: see the module.
        rms: root mean square of the memory's representations.
        head_rms: root mean square of the LM head's rows.
        dropout: probability with which a coordinate of A f is dropped in training.
    """

    def __init__(
        self,
        hidden_size: int,
        rank: int,
        form: AdapterForm,
        *,
        rms: float = 1.0,
        head_rms: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.form: AdapterForm = form
        self.A = nn.Linear(hidden_size, rank, bias=False)
        self.B_pd = nn.Linear(rank, hidden_size, bias=False)
        self.B_rct = nn.Linear(rank, hidden_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.rms: Tensor
        self.register_buffer("rms", torch.tensor(rms))
        if form != "paper":
            nn.init.zeros_(self.B_pd.weight)
        if form == "recent":
            self.E = nn.Linear(RECENT * hidden_size, rank, bias=False)
            self.drifted = nn.Parameter(torch.tensor(0.5))
            self.head_rms: Tensor
            self.register_buffer("head_rms", torch.tensor(head_rms))

    def scaled(self, cr_N_D: Tensor, agrees_N: Tensor | None = None) -> Tensor:
        """x = f / rms in float32; for `recent`, less of it where it is known to come from another context.

        Args:
            cr_N_D: representations.
            agrees_N: bool, whether each is that of a context that ends as the true one; None if all are.
        """
        x_N_D = cr_N_D.float() / self.rms
        if self.form != "recent" or agrees_N is None:
            return x_N_D
        return x_N_D * torch.where(agrees_N, 1.0, self.drifted)[:, None]

    def recent(self, head: LMHead, previous_N_K: Tensor) -> Tensor | None:
        """e, the head rows of the tokens before, scaled [N, K·D]; None for forms that do not look at them.

        Args:
            head: of the candidates.
            previous_N_K: int64 index among the candidates, the newest first; −1 where there is none.
        """
        if self.form != "recent":
            return None
        rows_N_K_D = head.weight_V_D[previous_N_K.clamp(min=0)] / self.head_rms
        return (rows_N_K_D * (previous_N_K >= 0)[:, :, None]).flatten(1)

    @torch.no_grad()
    def turn_back(self, axes_D_D: Tensor) -> None:
        """From representations and head rows along other axes to those along their own.

        Args:
            axes_D_D: orthogonal, an axis each row: what was seen so far are the products with them.
        """
        self.A.weight.copy_(self.A.weight @ axes_D_D)
        for decoder in (self.B_pd, self.B_rct):
            decoder.weight.copy_(axes_D_D.T @ decoder.weight)
        if self.form == "recent":
            self.E.weight.copy_((self.E.weight.unflatten(1, (RECENT, -1)) @ axes_D_D).flatten(1))

    def reconstruction(self, x_N_D: Tensor) -> Tensor:
        """B_rct A x for scaled representations x."""
        result: Tensor = self.B_rct(self.dropout(self.A(x_N_D)))
        return result

    def hidden(self, x_N_D: Tensor, recent_N_E: Tensor | None = None) -> Tensor:
        """h_pd, the head's input, for scaled representations x and what `recent` made of the tokens before."""
        z_N_R: Tensor = self.A(x_N_D)
        if recent_N_E is not None:
            z_N_R = z_N_R + self.E(recent_N_E)
        update_N_D: Tensor = self.B_pd(self.dropout(z_N_R))
        return (update_N_D if self.form == "paper" else x_N_D + update_N_D) * self.rms


class AdapterCard(BaseModel):
    """All that is known of a trained adapter, as it lies in `adapter.json`."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    format: Literal["pema-adapter-1"] = "pema-adapter-1"
    model: ModelIdentity
    task: Task
    context_mode: ContextMode
    form: AdapterForm
    rank: int = Field(ge=1)
    candidates: int = Field(ge=1)
    length_ratio: FiniteFloat = Field(ge=0)
    mean_length: FiniteFloat = Field(ge=0)
    nearest: int = Field(default=0, ge=0)
    interpolation: Interpolation
    interpolation_why: str
    logit_scale: FiniteFloat
    softcap: FiniteFloat | None
    settings: dict[str, bool | int | float | str | None]
    validation: dict[str, float]
    memory_digest: str
    pairs_digest: str = ""
    tensors_sha256: str = ""

    def horizon(self, source_tokens: int) -> float:
        """SL: the length in tokens that a source text's target is expected to have. Needs no target."""
        return max(1.0, source_tokens * self.length_ratio)


class Adaptation(Protocol):
    """What the PLM can be interpolated with: a trained adapter, or a rival.

    Attributes:
        card: what is known of it.
        candidate_ids_C: int64, sorted: the tokens that it gives a probability.
        head: float32 LM-head rows of these tokens.
        nearest: finds the examples that the PLM sees; None if it sees the task's own.
    """

    @property
    def card(self) -> AdapterCard: ...
    @property
    def candidate_ids_C(self) -> Tensor: ...
    @property
    def head(self) -> LMHead: ...
    @property
    def nearest(self) -> NearestPairs | None: ...

    def logprobs(self, cr_N_D: Tensor, previous_N_K: Tensor | None = None) -> Tensor:
        """log P over the candidates [N, C], float32.

        Args:
            cr_N_D: representations.
            previous_N_K: int64 token ids of the last tokens of the answer so far, the newest first; −1 for none.
                None if all answers begin here.
        """


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter with the head rows of its candidate vocabulary, ready to decode with.

    Attributes:
        candidate_ids_C: int64, sorted.
        head: float32 head rows of these tokens.
        pairs: where the examples of the PLM's prompts are taken from, if each is to have its own (`card.nearest`).
    """

    card: AdapterCard
    adapter: Adapter
    candidate_ids_C: Tensor
    head: LMHead
    pairs: Sequence[Pair] = ()

    @cached_property
    def nearest(self) -> NearestPairs | None:
        """Finds the examples that the PLM sees; None if it sees the task's own."""
        return NearestPairs(self.pairs, self.card.nearest) if self.card.nearest else None

    @torch.inference_mode()
    def logprobs(self, cr_N_D: Tensor, previous_N_K: Tensor | None = None) -> Tensor:
        """log P_PEMA over the candidates [N, C], float32. The arguments: see `Adaptation`."""
        if previous_N_K is None:
            previous_N_K = torch.full((len(cr_N_D), RECENT), -1)
        adapter = self.adapter.eval()
        recent_N_E = adapter.recent(self.head, places(previous_N_K, self.candidate_ids_C))
        return self.head.logits(adapter.hidden(adapter.scaled(cr_N_D), recent_N_E)).log_softmax(dim=-1)

    def save(self, folder: Path) -> None:
        """Write the adapter: tensors first, then the JSON that makes it one.

        Raises:
            InvalidData: the disk is full.
        """
        tensors = {name: value.contiguous() for name, value in self.adapter.state_dict().items()}
        tensors |= {"candidate_ids_C": self.candidate_ids_C, "head.weight": self.head.weight_V_D.contiguous()}
        if self.head.bias_V is not None:
            tensors["head.bias"] = self.head.bias_V.contiguous()
        packed = safetensors.torch.save(tensors)
        card = self.card.model_copy(update={"tensors_sha256": hashlib.sha256(packed).hexdigest()})
        write_atomically(folder / _TENSORS, packed)
        if card.nearest:
            write_pairs(folder / _PAIRS, self.pairs)
        write_atomically(folder / _JSON, card.model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> TrainedAdapter:
        """Read an adapter.

        Raises:
            InvalidData: there is none, or its files are damaged.
        """
        damaged = InvalidData(f"The adapter in {folder} is damaged.", hint="Train it again: pema-client train.")
        try:
            card = AdapterCard.model_validate_json((folder / _JSON).read_bytes())
            packed = (folder / _TENSORS).read_bytes()
            if hashlib.sha256(packed).hexdigest() != card.tensors_sha256:
                raise damaged
            tensors = unpacked(packed)
        except OSError as error:
            raise InvalidData(f"{folder} holds no adapter.", hint="Train one: pema-client train.") from error
        except ValueError as error:
            raise damaged from error
        try:
            candidate_ids_C, weight = tensors.pop("candidate_ids_C"), tensors.pop("head.weight")
            head = LMHead(weight, tensors.pop("head.bias", None), card.logit_scale, card.softcap)
            _check_vocabulary(card, candidate_ids_C, head)
            # Before anything is as large as the card says.
            if tensors["A.weight"].shape != (card.rank, card.model.hidden_size):
                raise damaged
            adapter = Adapter(card.model.hidden_size, card.rank, card.form)
            adapter.load_state_dict(tensors)
        except (KeyError, RuntimeError, ValueError) as error:
            raise damaged from error
        if not all(value.isfinite().all() for value in (*tensors.values(), *head.parts())):
            raise damaged
        pairs = read_written_pairs(folder / _PAIRS) if card.nearest else []
        if card.nearest and digest_pairs(pairs) != card.pairs_digest:
            raise damaged
        return cls(card, adapter.eval(), candidate_ids_C, head, pairs)


def _check_vocabulary(card: AdapterCard, candidate_ids_C: Tensor, head: LMHead) -> None:
    """Refuse candidates that are no sorted ids of the model, each with its row of the head.

    Raises:
        ValueError: they are not.
    """
    fits = (
        candidate_ids_C.dtype == torch.int64
        and candidate_ids_C.shape == (card.candidates,)
        and bool((candidate_ids_C.diff() > 0).all())
        and int(candidate_ids_C[0]) >= 0
        and int(candidate_ids_C[-1]) < card.model.vocab_size
        and head.weight_V_D.shape == (card.candidates, card.model.hidden_size)
        and (head.bias_V is None or head.bias_V.shape == (card.candidates,))
        and all(part.dtype == torch.float32 for part in head.parts())
    )
    if not fits:
        raise ValueError("the candidates are not those of the card")

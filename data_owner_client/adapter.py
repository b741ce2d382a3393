"""The adapter: a few low-rank matrices that turn the PLM's representation into the data owner's distribution.

P_PEMA(· | c) = softmax(head(h_pd)) over the candidate vocabulary V' ⊂ V, the tokens that occur in the memory's targets.
`paper`: h_pd = B_pd A f. `residual`: h_pd = f + B_pd A f, which starts as the PLM itself.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from data_owner_client.decoding.interpolation import Interpolation
from data_owner_client.files import write_atomically
from data_owner_client.memory.store import ContextMode, ModelIdentity
from data_owner_client.tasks import Task
from protocol.errors import InvalidData
from protocol.head import LMHead

AdapterForm = Literal["paper", "residual"]
_JSON, _TENSORS = "adapter.json", "adapter.safetensors"


class Adapter(nn.Module):
    """A ∈ R^{R×D}, B_pd ∈ R^{D×R} (prediction) and B_rct ∈ R^{D×R} (reconstruction), all float32.

    Representations are divided by `rms`, their root mean square over the memory, so that one learning rate suits every
    model; the product is scaled back, so that the head sees its own scale.

    Args:
        hidden_size: D.
        rank: R.
        form: see the module.
        rms: root mean square of the memory's representations.
        dropout: probability with which a coordinate of A f is dropped in training.
    """

    def __init__(
        self, hidden_size: int, rank: int, form: AdapterForm, *, rms: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.form: AdapterForm = form
        self.A = nn.Linear(hidden_size, rank, bias=False)
        self.B_pd = nn.Linear(rank, hidden_size, bias=False)
        self.B_rct = nn.Linear(rank, hidden_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.rms: Tensor
        self.register_buffer("rms", torch.tensor(rms))
        if form == "residual":
            nn.init.zeros_(self.B_pd.weight)

    def scaled(self, cr_N_D: Tensor) -> Tensor:
        """f / rms in float32."""
        return cr_N_D.float() / self.rms

    def reconstruction(self, x_N_D: Tensor) -> Tensor:
        """B_rct A x for scaled representations x."""
        result: Tensor = self.B_rct(self.dropout(self.A(x_N_D)))
        return result

    def hidden(self, x_N_D: Tensor) -> Tensor:
        """h_pd, the head's input, for scaled representations x."""
        update_N_D: Tensor = self.B_pd(self.dropout(self.A(x_N_D)))
        return (x_N_D + update_N_D if self.form == "residual" else update_N_D) * self.rms


class AdapterCard(BaseModel):
    """All that is known of a trained adapter, as it lies in `adapter.json`."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    format: Literal["pema-adapter-1"] = "pema-adapter-1"
    model: ModelIdentity
    task: Task
    context_mode: ContextMode
    form: AdapterForm
    rank: int
    candidates: int
    length_ratio: float
    mean_length: float
    interpolation: Interpolation
    interpolation_why: str
    logit_scale: float
    softcap: float | None
    settings: dict[str, bool | int | float | str | None]
    validation: dict[str, float]
    memory_digest: str
    tensors_sha256: str = ""


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter with the head rows of its candidate vocabulary, ready to decode with.

    Attributes:
        candidate_ids_C: int64, sorted.
        head: float32 head rows of these tokens.
    """

    card: AdapterCard
    adapter: Adapter
    candidate_ids_C: Tensor
    head: LMHead

    @torch.inference_mode()
    def logprobs(self, cr_N_D: Tensor) -> Tensor:
        """log P_PEMA over the candidates [N, C], float32."""
        self.adapter.eval()
        return self.head.logits(self.adapter.hidden(self.adapter.scaled(cr_N_D))).log_softmax(dim=-1)

    def horizon(self, source_tokens: int) -> float:
        """SL: the length in tokens that a source text's target is expected to have. Needs no target."""
        return max(1.0, source_tokens * self.card.length_ratio)

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
            tensors = safetensors.torch.load(packed)
        except OSError as error:
            raise InvalidData(f"{folder} holds no adapter.", hint="Train one: pema-client train.") from error
        except (ValidationError, SafetensorError) as error:
            raise damaged from error
        try:
            candidate_ids_C, weight = tensors.pop("candidate_ids_C"), tensors.pop("head.weight")
            head = LMHead(weight, tensors.pop("head.bias", None), card.logit_scale, card.softcap)
            adapter = Adapter(card.model.hidden_size, card.rank, card.form)
            adapter.load_state_dict(tensors)
        except (KeyError, RuntimeError) as error:
            raise damaged from error
        return cls(card, adapter.eval(), candidate_ids_C, head)

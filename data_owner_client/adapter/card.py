"""The adapter card (`adapter.json`), and the interface of whatever the PLM is mixed with."""

from __future__ import annotations

from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from torch import Tensor

from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.adapter.network import AdapterForm
from data_owner_client.data.example_retrieval import ExampleRetriever
from data_owner_client.data.tasks import Task
from data_owner_client.memory.manifest import ContextMode
from data_owner_client.plm.identity import ModelIdentity
from protocol.head import LMHead


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


class CandidateDistribution(Protocol):
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
    def nearest(self) -> ExampleRetriever | None: ...

    def logprobs(self, cr_N_D: Tensor, previous_N_K: Tensor | None = None) -> Tensor:
        """log P over the candidates [N, C], float32.

        Args:
            cr_N_D: representations.
            previous_N_K: int64 token ids of the last tokens of the answer so far, the newest first; −1 for none.
                None if all answers begin here.
        """

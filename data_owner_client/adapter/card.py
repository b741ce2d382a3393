"""The adapter card (`adapter.json`), and the interface of a distribution that the PLM can be mixed with."""

from __future__ import annotations

from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator
from torch import Tensor

from data_owner_client.adapter.bounds import TextBounds
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.adapter.types import AdapterForm
from data_owner_client.data.example_retrieval import ExampleRetriever
from data_owner_client.data.tasks import Task
from data_owner_client.memory.types import ContextMode
from data_owner_client.plm.identity import ModelIdentity
from protocol.head import LMHead

# More networks than any training makes; the time of decoding grows with their number.
_MOST_MEMBERS = 64

Settings = dict[str, bool | int | float | str | None]
"""Training settings by name."""


class MemberCard(BaseModel):
    """One of the networks whose distributions an adapter averages.

    Attributes:
        form: form of the network.
        rank: rank of its matrices.
        weight: share of its distribution in the average.
        settings: training settings that led to it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    form: AdapterForm
    rank: int = Field(ge=1)
    weight: float = Field(gt=0, le=1)
    settings: Settings


class AdapterCard(BaseModel):
    """The metadata of a trained adapter, as `adapter.json` stores it.

    Attributes:
        form: form of the network, or of the first member.
        rank: rank of its matrices.
        candidates: number of candidate tokens.
        members: networks whose distributions are averaged, the heaviest first; empty for a single network.
        length_ratio: target tokens per source token in the training memory.
        mean_length: mean target length in the training memory, in tokens.
        bounds: bounds of a text, from the targets of the training memory; None on cards of earlier versions.
        nearest: retrieved examples in each of the PLM's prompts; 0 for the examples of the task.
        interpolation: schedule or gate of λ that training chose.
        interpolation_why: reason for that choice, in words.
        label_temperature: of a `classify` task, temperature of the labels' probabilities, fitted on the validation
            texts (Guo et al. 2017, On Calibration of Modern Neural Networks); 1 changes nothing.
        logit_scale: factor of the LM head's logits.
        softcap: bound of the LM head's logits; None for no bound.
        settings: training settings that led to the adapter, or to the first member.
        validation: scores on the validation memory, by name.
        memory_digest: digest of the training memory.
        pairs_digest: digest of `pairs.jsonl`; empty without retrieved examples.
        tensors_sha256: SHA-256 of `adapter.safetensors`.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    format: Literal["pema-adapter-1"] = "pema-adapter-1"
    model: ModelIdentity
    task: Task
    context_mode: ContextMode
    form: AdapterForm
    rank: int = Field(ge=1)
    candidates: int = Field(ge=1)
    members: tuple[MemberCard, ...] = Field(default=(), max_length=_MOST_MEMBERS)
    length_ratio: FiniteFloat = Field(ge=0)
    mean_length: FiniteFloat = Field(ge=0)
    bounds: TextBounds | None = None
    nearest: int = Field(default=0, ge=0)
    interpolation: Interpolation
    interpolation_why: str
    label_temperature: float = Field(default=1.0, gt=0, le=1e6)
    logit_scale: FiniteFloat
    softcap: FiniteFloat | None
    settings: Settings
    validation: dict[str, float]
    memory_digest: str
    pairs_digest: str = ""
    tensors_sha256: str = ""

    @model_validator(mode="after")
    def _require_members_to_fit(self) -> AdapterCard:
        if not self.members:
            return self
        if abs(sum(member.weight for member in self.members) - 1.0) > 1e-6:
            raise ValueError("the members' weights do not sum to 1")
        if (self.members[0].form, self.members[0].rank) != (self.form, self.rank):
            raise ValueError("form and rank are not those of the first member")
        return self

    @property
    def sees_recent_tokens(self) -> bool:
        """True if the distribution depends on the previous tokens of the answer, not only on the representation."""
        return "recent" in {self.form, *(member.form for member in self.members)}

    def expected_length(self, source_tokens: int) -> float:
        """SL: the expected length of the answer to a source text, in tokens. Needs no target."""
        return max(1.0, source_tokens * self.length_ratio)


class CandidateDistribution(Protocol):
    """A distribution over candidate tokens that the PLM can be interpolated with: a trained adapter, or a baseline.

    Attributes:
        card: its metadata.
        candidate_ids_C: int64, sorted: the tokens that have a probability.
        head: float32 LM-head rows of these tokens.
        retriever: finds the examples of the PLM's prompts; None for the examples of the task.
    """

    @property
    def card(self) -> AdapterCard: ...
    @property
    def candidate_ids_C(self) -> Tensor: ...
    @property
    def head(self) -> LMHead: ...
    @property
    def retriever(self) -> ExampleRetriever | None: ...

    def logprobs(self, cr_N_D: Tensor, previous_N_P: Tensor | None = None) -> Tensor:
        """log P over the candidates [N, C], float32.

        Args:
            cr_N_D: representations.
            previous_N_P: int64 ids of the last P tokens of the answer so far, the newest first; −1 for none. None
                where every answer begins.
        """

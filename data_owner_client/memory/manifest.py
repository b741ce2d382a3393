"""The manifest of an external memory: its shards, its plan and its identity."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from data_owner_client.data.tasks import Task
from data_owner_client.plm.identity import ModelIdentity
from protocol.types import WireDtype

ContextMode = Literal["private", "teacher-forced"]


class ShardRecord(BaseModel):
    """One shard as the manifest knows it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str = Field(pattern=r"^shard-[0-9]{5,}\.safetensors$")
    examples: int = Field(ge=0)
    rows: int = Field(ge=0)
    sha256: str


class MemoryPlan(BaseModel):
    """What decides the content of a memory. Two builds with the same plan give the same memory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelIdentity
    task: Task
    context_mode: ContextMode
    dtype: WireDtype
    with_logsumexp: bool
    data_digest: str
    examples: int = Field(ge=0)
    examples_per_shard: int = Field(ge=1)


class Manifest(BaseModel):
    """Plan, shards so far, and the token counts that the length ratio is made of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["pema-memory-2"] = "pema-memory-2"
    plan: MemoryPlan
    shards: tuple[ShardRecord, ...] = ()
    source_tokens: int = Field(default=0, ge=0)

    @property
    def examples(self) -> int:
        """Examples stored so far."""
        return sum(shard.examples for shard in self.shards)

    @property
    def rows(self) -> int:
        """Rows stored so far."""
        return sum(shard.rows for shard in self.shards)

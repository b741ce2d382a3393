"""The manifest of an external memory: plan, shards and token counts."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from data_owner_client.data.tasks import Task
from data_owner_client.memory.types import ContextMode
from data_owner_client.plm.identity import ModelIdentity
from protocol.types import WireDtype


class ShardRecord(BaseModel):
    """One shard in the manifest.

    Attributes:
        file: name of the shard's file.
        examples: pairs in the shard.
        rows: target tokens in the shard.
        sha256: checksum of the file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str = Field(pattern=r"^shard-[0-9]{5,}\.safetensors$")
    examples: int = Field(ge=0)
    rows: int = Field(ge=0)
    sha256: str


class MemoryPlan(BaseModel):
    """Everything that decides the content of a memory. Two builds with the same plan give the same memory.

    Attributes:
        model: model that computes the representations.
        task: template of the prompts.
        context_mode: source of the contexts.
        dtype: number format of the representations.
        with_logsumexp: whether each row has its log-sum-exp.
        data_digest: SHA-256 over the pairs (`data.pairs.digest_pairs`).
        redaction_rules: SHA-256 of the rules of a redacted memory; None in other memories.
        shown_digest: SHA-256 over the pairs with the surrogates of a redacted memory; None in other memories.
        examples: number of pairs.
        examples_per_shard: pairs in each shard except the last.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelIdentity
    task: Task
    context_mode: ContextMode
    dtype: WireDtype
    with_logsumexp: bool
    data_digest: str
    redaction_rules: str | None = None
    shown_digest: str | None = None
    examples: int = Field(ge=0)
    examples_per_shard: int = Field(ge=1)


class Manifest(BaseModel):
    """Content of `manifest.json`.

    Attributes:
        format: version of the layout.
        plan: everything that decides the content.
        shards: shards written so far.
        source_tokens: tokens of the source texts stored so far; the length ratio needs them.
    """

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

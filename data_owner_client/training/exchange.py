"""Counts of what client and owner have shown each other to build memories and train on them."""

from __future__ import annotations

from pydantic import BaseModel

from data_owner_client.data.pairs import texts_of
from data_owner_client.memory.store import ExternalMemory
from data_owner_client.memory.types import ContextMode
from protocol.messages import DTYPES

# LM-head rows and distributions always travel as float32.
_HEAD_BYTES = 4


class Exchange(BaseModel):
    """Counts of what both memories and the LM head's rows have shown to the other side.

    Texts that `train` decodes, and answers of a trained adapter, come on top.

    Attributes:
        context_mode: whether the owner has seen the targets (`teacher-forced`), the targets with surrogates
            (`redacted`), or how long each is (`private`).
        pairs: pairs of both memories, whose sources the owner has seen.
        source_bytes: bytes of the sources in UTF-8.
        target_bytes: bytes of the targets that the owner has seen, surrogates included, in UTF-8; 0 if the contexts are
            private.
        representations: representations that the client has, one for each target token.
        representation_bytes: bytes of the representations.
        head_rows: rows of the LM head that the client has requested, by which the owner knows the tokens of the
            targets; None if unknown.
        head_row_bytes: bytes of the rows; None if unknown.
        distributions: full distributions from which the client recovered the rows that the owner does not give.
        distribution_bytes: bytes of the distributions.
    """

    context_mode: ContextMode
    pairs: int
    source_bytes: int
    target_bytes: int
    representations: int
    representation_bytes: int
    head_rows: int | None = None
    head_row_bytes: int | None = None
    distributions: int = 0
    distribution_bytes: int = 0

    @classmethod
    def from_memories(
        cls, train: ExternalMemory, validation: ExternalMemory, *, head_rows: int | None = None, distributions: int = 0
    ) -> Exchange:
        """Count the texts and rows of both memories.

        Args:
            train: memory that an adapter was trained on.
            validation: memory that it was validated on.
            head_rows: rows of the LM head that the owner was asked for; None if unknown.
            distributions: full distributions that the owner was asked for.

        Raises:
            InvalidData: a memory has no texts, or others than it was built from.
        """
        plan, model = train.manifest.plan, train.manifest.plan.model
        source_bytes = target_bytes = 0
        for memory in (train, validation):
            shown = memory.shown_pairs()
            for pair in memory.pairs() if shown is None else shown:
                source_bytes += sum(len(text.encode()) for text in texts_of(pair.question))
                target_bytes += len((pair.target or "").encode())
        rows = train.manifest.rows + validation.manifest.rows
        # Representations inside the last layer travel with the LM head's input beside them.
        vectors = 1 if model.cr_kind == "last_hidden_state" else 2
        return cls(
            context_mode=plan.context_mode,
            pairs=train.manifest.examples + validation.manifest.examples,
            source_bytes=source_bytes,
            target_bytes=0 if plan.context_mode == "private" else target_bytes,
            representations=rows,
            representation_bytes=rows * vectors * model.hidden_size * DTYPES[plan.dtype].itemsize,
            head_rows=head_rows,
            head_row_bytes=None if head_rows is None else head_rows * model.hidden_size * _HEAD_BYTES,
            distributions=distributions,
            distribution_bytes=distributions * model.vocab_size * _HEAD_BYTES,
        )

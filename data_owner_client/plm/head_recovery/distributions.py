"""Full next-token distributions on disk: one file a context, written as soon as the server has answered.

Each file holds the probabilities of all tokens, so targets of another memory or of a test set need no further calls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_owner_client.runtime.atomic_files import write_atomically
from protocol.codec import FloatTensor, Message
from protocol.errors import InvalidData
from protocol.messages import ModelCard

# Contexts that are in memory at a time.
_CONTEXTS_PER_BLOCK = 64


class DistributionRecord(Message):
    """The server's answer for one context c.

    Attributes:
        input_D: float32, the LM head's input.
        logsumexp: log Σ_v exp(logit_v).
        logprob_V: float32, log P(v|c) of all tokens.
    """

    input_D: FloatTensor
    logsumexp: float
    logprob_V: FloatTensor


class Distributions:
    """The stored distributions of one model, as one tenant sees it.

    Args:
        folder: folder with the distributions of all models.
        card: card of the model; its digest names the subfolder.
    """

    def __init__(self, folder: Path, card: ModelCard) -> None:
        self.folder = folder / card.digest
        self.card = card

    def __contains__(self, key: str) -> bool:
        return self._path(key).exists()

    def keys(self) -> list[str]:
        """Keys of all stored contexts, sorted."""
        return sorted(path.stem for path in self.folder.glob("[!.]*.safetensors"))

    @property
    def digest(self) -> str:
        """SHA-256 over the keys of all stored contexts."""
        return hashlib.sha256("".join(self.keys()).encode()).hexdigest()

    def store(self, key: str, record: DistributionRecord) -> None:
        """Store the record of a context under its key.

        Raises:
            InvalidData: the disk is full.
        """
        write_atomically(self._path(key), record.to_bytes())

    def blocks(self, keys: Sequence[str], token_ids_C: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the stored contexts, in blocks of N.

        Args:
            keys: keys of the contexts.
            token_ids_C: ids of the tokens whose logits are needed.

        Returns:
            The head's inputs [N, D] and the tokens' logits [N, C] of each block, in float64.

        Raises:
            InvalidData: a file is damaged; it is deleted.
        """
        for start in range(0, len(keys), _CONTEXTS_PER_BLOCK):
            inputs, logits = [], []
            for key in keys[start : start + _CONTEXTS_PER_BLOCK]:
                record = self._load(key)
                inputs.append(record.input_D.double())
                logits.append(record.logprob_V[token_ids_C].double() + record.logsumexp)
            yield torch.stack(inputs), torch.stack(logits)

    def _load(self, key: str) -> DistributionRecord:
        path, card = self._path(key), self.card
        try:
            record = DistributionRecord.from_bytes(path.read_bytes())
            if record.input_D.shape != (card.hidden_size,) or record.logprob_V.shape != (card.vocab_size,):
                raise ValueError("a record of another model")
        except (OSError, ValueError) as error:
            path.unlink(missing_ok=True)
            raise InvalidData(
                f"{path} was damaged, and was deleted.",
                hint="Run pema-client train again: it requests the distribution again.",
            ) from error
        return record

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

"""Full distributions that an owner answered, on disk: one file a context, written as soon as it is answered.

They hold the probabilities of all tokens, so that other targets, of another memory or of a test set, need no further
call.
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
_AT_ONCE = 64


class DistributionRecord(Message):
    """What the owner told of one context.

    Attributes:
        input_D: float32, the LM head's input.
        logsumexp: log Σ_v exp(logit_v).
        logprob_V: float32, log P(v|c).
    """

    input_D: FloatTensor
    logsumexp: float
    logprob_V: FloatTensor


class Distributions:
    """The answers of one model, or of one tenant's view of it.

    Args:
        folder: of all models.
        card: of the model.
    """

    def __init__(self, folder: Path, card: ModelCard) -> None:
        self.folder = folder / card.digest
        self.card = card

    def __contains__(self, key: str) -> bool:
        return self._path(key).exists()

    def keys(self) -> list[str]:
        """Names of all contexts that are answered, sorted."""
        return sorted(path.stem for path in self.folder.glob("[!.]*.safetensors"))

    @property
    def digest(self) -> str:
        """SHA-256 over all names."""
        return hashlib.sha256("".join(self.keys()).encode()).hexdigest()

    def keep(self, key: str, answer: DistributionRecord) -> None:
        """Store an answer under the name of its context.

        Raises:
            InvalidData: the disk is full.
        """
        write_atomically(self._path(key), answer.to_bytes())

    def blocks(self, keys: Sequence[str], token_ids_C: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The head's inputs [N, D] and the logits of some tokens [N, C] in float64, some contexts at a time.

        Raises:
            InvalidData: a file is damaged; it is deleted.
        """
        for start in range(0, len(keys), _AT_ONCE):
            inputs, logits = [], []
            for key in keys[start : start + _AT_ONCE]:
                answer = self._load(key)
                inputs.append(answer.input_D.double())
                logits.append(answer.logprob_V[token_ids_C].double() + answer.logsumexp)
            yield torch.stack(inputs), torch.stack(logits)

    def _load(self, key: str) -> DistributionRecord:
        path, card = self._path(key), self.card
        try:
            answer = DistributionRecord.from_bytes(path.read_bytes())
            if answer.input_D.shape != (card.hidden_size,) or answer.logprob_V.shape != (card.vocab_size,):
                raise ValueError("an answer of another model")
        except (OSError, ValueError) as error:
            path.unlink(missing_ok=True)
            raise InvalidData(
                f"{path} was damaged, and was deleted.", hint="Run pema-client train again: it asks for it anew."
            ) from error
        return answer

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

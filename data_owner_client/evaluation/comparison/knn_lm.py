"""kNN-LM (Khandelwal et al., ICLR 2020, arXiv 1911.00172) on an external memory, as a baseline without an adapter.

P_kNN(y | c) ∝ Σ over the k rows nearest to f(c) of [y_i = y] · exp(−‖f(c) − f(c_i)‖² / T).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_owner_client.adapter.candidates import index_of
from data_owner_client.adapter.card import AdapterCard
from data_owner_client.memory.store import ExternalMemory
from data_owner_client.training.validation import ValidationData
from protocol.errors import Unsupported
from protocol.head import LMHead

_NEIGHBOURS = (4, 8, 16, 32, 64)
# Multiples of the mean squared distance to the nearest neighbours.
_TEMPERATURES = (0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class KnnLm:
    """P_kNN in the place of an adapter's distribution.

    Attributes:
        card: card of the adapter that it stands in for.
        candidate_ids_C: int64, sorted.
        head: float32 LM-head rows of the candidates.
        index: faiss' exact index of all rows.
        label_N: int64 index of each row's target among the candidates.
        neighbours: k.
        temperature: T, in squared units of the representations.
        retriever: None, as the PLM sees the examples of the task.
    """

    card: AdapterCard
    candidate_ids_C: Tensor
    head: LMHead
    index: Any
    label_N: Tensor
    neighbours: int
    temperature: float
    retriever: None = None

    def logprobs(self, cr_N_D: Tensor, previous_N_P: Tensor | None = None) -> Tensor:
        """log P_kNN over the candidates [N, C], float32; −∞ for tokens that no neighbour has."""
        distance_N_K, row_N_K = nearest_rows(self.index, cr_N_D, self.neighbours)
        weight_N_K = (-distance_N_K / self.temperature).softmax(dim=-1)
        probability_N_C = torch.zeros(len(cr_N_D), len(self.candidate_ids_C))
        return probability_N_C.scatter_add_(1, self.label_N[row_N_K], weight_N_K).log()


def build_index(memory: ExternalMemory, candidate_ids_C: Tensor, rows: int | None = None) -> tuple[Any, Tensor]:
    """faiss' exact index of rows, and the index of each target among the candidates.

    Args:
        memory: the memory.
        candidate_ids_C: int64, sorted.
        rows: number of rows, from the memory's first; None for all.

    Raises:
        Unsupported: faiss is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise Unsupported("kNN-LM needs faiss.", hint="pip install -e '.[client,compare]'") from error
    index: Any = None
    labels = list[Tensor]()
    for shard in memory.shards():
        room = None if rows is None else rows - sum(map(len, labels))
        cr_N_D = shard.representations_N_D()[:room].float().contiguous()
        if index is None:
            index = faiss.IndexFlatL2(cr_N_D.shape[1])
        index.add(cr_N_D.numpy())
        labels.append(index_of(shard.target_N[:room].long(), candidate_ids_C))
    return index, torch.cat(labels)


def nearest_rows(index: Any, cr_N_D: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """Squared distances and numbers of the rows nearest to each representation, the nearest first."""
    distance_N_K, row_N_K = index.search(cr_N_D.float().contiguous().numpy(), min(neighbours, index.ntotal))
    return torch.from_numpy(distance_N_K), torch.from_numpy(row_N_K)


def tune_knn(index: Any, label_N: Tensor, validation: ValidationData) -> tuple[int, float, Tensor]:
    """The k and T of the likeliest mixture with constant λ, and log P_kNN(y) of the validation rows, float64."""
    distance_N_K, row_N_K = nearest_rows(index, validation.data.cr_N_D, _NEIGHBOURS[-1])
    is_target_N_K = _is_target(label_N, row_N_K, validation)
    scale = distance_N_K[:, : _NEIGHBOURS[0]].mean().item() or 1.0

    def trials() -> Iterator[tuple[float, int, float, Tensor]]:
        for k in _NEIGHBOURS:
            for temperature in (scale * factor for factor in _TEMPERATURES):
                logprob_N = _target_logprobs(distance_N_K[:, :k], is_target_N_K[:, :k], temperature)
                yield validation.best(logprob_N, "constant")[1], k, temperature, logprob_N

    _, neighbours, temperature, logprob_N = min(trials(), key=lambda trial: trial[0])
    return neighbours, temperature, logprob_N


def target_knn_logprobs(
    index: Any, label_N: Tensor, rows: ValidationData, neighbours: int, temperature: float
) -> Tensor:
    """log P_kNN(y) of other rows, float64; −∞ where no neighbour has the target."""
    distance_N_K, row_N_K = nearest_rows(index, rows.data.cr_N_D, neighbours)
    return _target_logprobs(distance_N_K, _is_target(label_N, row_N_K, rows), temperature)


def _is_target(label_N: Tensor, row_N_K: Tensor, rows: ValidationData) -> Tensor:
    """1 for each neighbour that has the row's target, float64 [N, K]; 0 where the target is no candidate."""
    target_N_1 = rows.data.label_N[:, None]
    return ((label_N[row_N_K] == target_N_1) & (target_N_1 >= 0)).double()


def _target_logprobs(distance_N_K: Tensor, is_target_N_K: Tensor, temperature: float) -> Tensor:
    weight_N_K = (-distance_N_K.double() / temperature).softmax(dim=-1)
    return (weight_N_K * is_target_N_K).sum(dim=-1).log()

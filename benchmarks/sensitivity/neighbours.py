"""P_kNN of the rows that an adapter was trained on, as a further distribution beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from data_owner_client.adapter.ensemble import mean_logprob
from data_owner_client.evaluation.comparison.knn_lm import build_index, target_knn_logprobs, tune_knn
from data_owner_client.memory.store import ExternalMemory
from data_owner_client.training.inputs import TrainingInput
from data_owner_client.training.member_selection import likeliest_weights
from data_owner_client.training.validation import ValidationData


def with_neighbours(
    memory: ExternalMemory, inputs: TrainingInput, test: ValidationData, held_out_N: Tensor, logprob_N: Tensor
) -> tuple[Tensor, Tensor]:
    """log P of the average of adapter and P_kNN, of the targets of the validation rows and of the test rows.

    k, temperature and weights are those of the likeliest mixture with the PLM on the validation rows.

    Args:
        memory: the memory; its first rows are those of the training.
        inputs: inputs of the training.
        test: the test rows.
        held_out_N: log P_PEMA of the validation rows' targets.
        logprob_N: log P_PEMA of the test rows' targets.
    """
    index, label_N = build_index(memory, inputs.stats.candidate_ids_C, rows=sum(inputs.rows.shard_rows))
    neighbours, temperature, held_out_knn_N = tune_knn(index, label_N, inputs.validation)
    knn_N = target_knn_logprobs(index, label_N, test, neighbours, temperature)
    weights = likeliest_weights(torch.stack([held_out_N, held_out_knn_N]), inputs.validation.plm_logprob_N).tolist()
    return mean_logprob([held_out_N, held_out_knn_N], weights), mean_logprob([logprob_N, knn_N], weights)

"""Baselines of building a memory: the bare model on the same sequences, and the way of the reference code."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import nn

from data_owner_client.memory.tokenized_pairs import TokenizedPair
from plm_owner_server.engines.batching import plan_batches
from plm_owner_server.engines.model_files.sources import resolve
from plm_owner_server.engines.transformers.engine import load_model
from plm_owner_server.settings import DEFAULT_MODEL, ServerSettings


class Baseline:
    """transformers over the sequences that a teacher-forced memory needs.

    Args:
        pairs: pairs as the client tokenises them.
    """

    def __init__(self, pairs: Sequence[TokenizedPair]) -> None:
        settings = ServerSettings(_env_file=None)
        folder = resolve(DEFAULT_MODEL, settings.cache_dir).folder
        self._pairs = pairs
        self._model = load_model(folder, device="cpu", dtype="float32")
        self._sequences = [torch.tensor(pair.prompt + pair.target[:-1]) for pair in pairs]
        lengths = list(map(len, self._sequences))
        self._plan = plan_batches(lengths, settings.max_batch_tokens, settings.max_batch_padding)
        self.rows = sum(len(pair.target) for pair in pairs)
        self.hidden_size = int(self._model.config.hidden_size)

    @torch.inference_mode()
    def rows_per_s(self) -> float:
        """Rows per second of one bare forward pass over all sequences, in padded batches of similar length."""
        started = time.perf_counter()
        for batch in self._plan:
            sequences = [self._sequences[i] for i in batch]
            ids_B_T = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
            mask_B_T = nn.utils.rnn.pad_sequence([torch.ones_like(ids_T) for ids_T in sequences], batch_first=True)
            self._model.base_model(input_ids=ids_B_T, attention_mask=mask_B_T, use_cache=False)
        return self.rows / (time.perf_counter() - started)

    @torch.inference_mode()
    def generate_rows_per_s(self, examples: int) -> float:
        """Rows per second of the reference implementation: free-running generation, one example at a time."""
        rows, started = 0, time.perf_counter()
        for pair in self._pairs[:examples]:
            ids_1_T = torch.tensor([pair.prompt])
            answer = self._model.generate(
                ids_1_T,
                attention_mask=torch.ones_like(ids_1_T),
                do_sample=False,
                min_new_tokens=len(pair.target),
                max_new_tokens=len(pair.target),
                output_hidden_states=True,
                return_dict_in_generate=True,
            )
            rows += len(answer.hidden_states)
        return rows / (time.perf_counter() - started)

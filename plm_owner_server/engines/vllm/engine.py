"""The engine over a model that returns hidden states of single texts and schedules itself, such as vLLM."""

from __future__ import annotations

import logging

import torch

from plm_owner_server.engines.interface import EncodeBatch, Encoded, EngineInfo
from plm_owner_server.engines.ops.vocab_reduction import VocabReduction
from plm_owner_server.engines.vllm.drafting import PooledDrafting
from plm_owner_server.engines.vllm.model_runner import PooledRunner, PositionRange
from protocol.errors import Unsupported
from protocol.head import LMHead
from protocol.integrity import token_crc32

log = logging.getLogger(__name__)


class PooledEngine:
    """Runs a model that schedules itself. Its only representation is the last hidden state.

    Args:
        runner: runs texts on the model.
        info: description of the model.
        head: the model's LM head, in the dtype of the model's weights.
        pack_weights: on a CPU, also hold the LM head in a faster layout.

    Attributes:
        info: description of the model.
        head: the model's LM head.
        stats: statistics of what was run.
    """

    def __init__(self, runner: PooledRunner, *, info: EngineInfo, head: LMHead, pack_weights: bool = False) -> None:
        self.info = info
        self.head = head
        self.stats = runner.stats
        self._runner = runner
        self._vocab = VocabReduction(head, packed=pack_weights)

    def is_alive(self) -> bool:
        """Return whether all of the model's processes still run. Any thread may call it."""
        return self._runner.is_alive()

    def reset(self) -> None:
        """Remove all cached states, and start the statistics again."""
        self._runner.reset()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Check on real passes that states are raw, and that a position's state does not depend on the request.

        The head cannot be checked against the model's logits, because such a model returns none.

        Raises:
            Unsupported: the states are not as wide as the head's input, not finite, or normalised, or those of one
                position differ.
        """
        ids = [token % self.info.vocab_size for token in range(1, 9)]
        results, _ = self._runner.run([PositionRange(ids, 0), PositionRange(ids, len(ids) - 1)], "encode")
        whole_T_D, last_1_D = (result.hidden_T_D.float() for result in results)
        if whole_T_D.shape[1] != self.info.hidden_size:
            raise _unsupported(f"The states are {whole_T_D.shape[1]} wide; the head takes {self.info.hidden_size}.")
        norm_T = whole_T_D.norm(dim=-1)
        if not norm_T.isfinite().all() or (norm_T - 1).abs().max() < 1e-3:
            raise _unsupported("The states are normalised, or not finite.")
        error = ((whole_T_D[-1:] - last_1_D).abs().max() / whole_T_D.abs().max()).item()
        if not error <= (1e-4 if self.info.dtype == "float32" else 3e-2):
            raise _unsupported(f"A position's state depends on the request: relative difference {error:.1e}.")
        log.info("warm-up: a position requested alone agrees with itself among all to %.1e", error)

    @torch.inference_mode()
    def encode(self, batch: EncodeBatch) -> Encoded:
        """Representations of all positions ≥ `from_position` of every sequence."""
        ranges = [
            PositionRange(ids, start, batch.tenant)
            for ids, start in zip(batch.token_ids, batch.from_position, strict=True)
        ]
        results, _ = self._runner.run(ranges, "encode")
        cr_N_D, logsumexp_N = torch.cat([result.hidden_T_D for result in results]), None
        if batch.with_logsumexp:
            logsumexp_N, _, _ = self._vocab.reduce_from_host(cr_N_D)
        return Encoded(
            rows=[positions.rows for positions in ranges],
            echo=[token_crc32(result.token_ids) for result in results],
            cr_N_D=cr_N_D,
            last_hidden_N_D=None,
            logsumexp_N=logsumexp_N,
        )

    def evict_idle(self) -> None:
        """Remove all cached states once the oldest have passed the time limit. Any thread may call it."""
        self._runner.evict_idle()

    def drafting(self, batch_tokens: int) -> PooledDrafting:
        """A new, empty `PooledDrafting`. The model forms batches itself, so that `batch_tokens` has no effect."""
        return PooledDrafting(self._runner, self._vocab)


def _unsupported(problem: str) -> Unsupported:
    return Unsupported(problem, hint="This engine cannot serve this model; try --engine transformers.")

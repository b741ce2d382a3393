"""An engine over a model that is asked for hidden states, text by text, and schedules them itself, as vLLM does."""

from __future__ import annotations

import logging

import torch

from plm_owner_server.engines.interface import EncodeBatch, Encoded, EngineInfo
from plm_owner_server.engines.ops.vocab_reduction import VocabReduction
from plm_owner_server.engines.vllm.drafting import PooledDrafting
from plm_owner_server.engines.vllm.model_runner import PooledRunner, PositionRange
from protocol.errors import Unsupported
from protocol.head import LMHead
from protocol.integrity import echo

log = logging.getLogger(__name__)


class PooledEngine:
    """Runs a model that schedules itself. Its representation is the last hidden state; it has no other.

    Args:
        runner: runs texts on it.
        info: of the model.
        head: its LM head, in the dtype of its weights.
        pack_weights: on a CPU, hold the LM head in a faster layout, too.
    """

    def __init__(self, runner: PooledRunner, *, info: EngineInfo, head: LMHead, pack_weights: bool = False) -> None:
        self.info = info
        self.head = head
        self.counts = runner.counts
        self._runner = runner
        self._vocabulary = VocabReduction(head, packed=pack_weights)

    def is_alive(self) -> bool:
        """Whether the model's processes are there. Any thread may call it."""
        return self._runner.is_alive()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Check on real passes that a position has the same state alone as among all, and that states are raw.

        The head cannot be checked against the model's own logits here: such a model has none.

        Raises:
            Unsupported: the states are not of the head's width, not finite, normalised, or differ.
        """
        ids = [token % self.info.vocab_size for token in range(1, 9)]
        answers, _ = self._runner.run([PositionRange(ids, 0), PositionRange(ids, len(ids) - 1)], "encode")
        whole_T_D, newest_1_D = (answer.hidden_T_D.float() for answer in answers)
        if whole_T_D.shape[1] != self.info.hidden_size:
            raise _unknown(f"The states are {whole_T_D.shape[1]} wide, the head takes {self.info.hidden_size}.")
        norm_T = whole_T_D.norm(dim=-1)
        if not norm_T.isfinite().all() or (norm_T - 1).abs().max() < 1e-3:
            raise _unknown("The states are normalised, or not finite.")
        error = ((whole_T_D[-1:] - newest_1_D).abs().max() / whole_T_D.abs().max()).item()
        if not error <= (1e-4 if self.info.dtype == "float32" else 3e-2):
            raise _unknown(f"A position alone has another state than among all: relative difference {error:.1e}.")
        log.info("warm-up: a position alone differs from itself among all by %.1e", error)

    @torch.inference_mode()
    def encode(self, batch: EncodeBatch) -> Encoded:
        """Representations of all positions ≥ `from_position` of every sequence."""
        wanted = [
            PositionRange(ids, start, batch.tenant)
            for ids, start in zip(batch.token_ids, batch.from_position, strict=True)
        ]
        answers, _ = self._runner.run(wanted, "encode")
        cr_N_D, logsumexp_N = torch.cat([answer.hidden_T_D for answer in answers]), None
        if batch.with_logsumexp:
            logsumexp_N, _, _ = self._vocabulary.reduce_from_host(cr_N_D)
        return Encoded(
            rows=[each.rows for each in wanted],
            echo=[echo(answer.token_ids) for answer in answers],
            cr_N_D=cr_N_D,
            last_hidden_N_D=None,
            logsumexp_N=logsumexp_N,
        )

    def forget_unused(self) -> None:
        """Drop what is known of texts, if it has been known for long. Any thread may call it."""
        self._runner.forget_unused()

    def drafting(self, batch_tokens: int) -> PooledDrafting:
        """Drafting that nothing has joined yet; how many tokens go together is the model's affair."""
        return PooledDrafting(self._runner, self._vocabulary)


def _unknown(problem: str) -> Unsupported:
    return Unsupported(problem, hint="This engine cannot serve this model; try --engine transformers.")

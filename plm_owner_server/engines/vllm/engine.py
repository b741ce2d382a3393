"""The engine over a model that drafts and schedules by itself, such as vLLM."""

from __future__ import annotations

import logging
from concurrent.futures import wait

import torch

from plm_owner_server.engines.interface import EncodeBatch, Encoded, EngineInfo
from plm_owner_server.engines.vllm.drafting import GenerationDrafting, echo
from plm_owner_server.engines.vllm.model_runner import GenerationRunner, TextQuery, TextRows
from protocol.errors import Unsupported
from protocol.head import LMHead

log = logging.getLogger(__name__)


class GenerationEngine:
    """Runs a model that drafts by itself. Its only representation is the last hidden state.

    Args:
        runner: sends queries to the model.
        info: description of the model.
        head: the model's LM head, in the dtype of the model's weights.

    Attributes:
        info: description of the model.
        head: the model's LM head.
        stats: statistics of what was run.
    """

    def __init__(self, runner: GenerationRunner, *, info: EngineInfo, head: LMHead) -> None:
        self.info = info
        self.head = head
        self.stats = runner.stats
        self._runner = runner

    def is_alive(self) -> bool:
        """Return whether all of the model's processes still run. Any thread may call it."""
        return self._runner.is_alive()

    def reset(self) -> None:
        """Remove all cached states, and start the statistics again."""
        self._runner.reset()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Check on a real pass and a draft that softmax(head(row)) is the model's distribution.

        Raises:
            Unsupported: the rows are not as wide as the head's input, not finite, or the head of them differs from the
                model's own logits.
        """
        ids = [token % self.info.vocab_size for token in range(1, 9)]
        query = TextQuery(ids, 0, scored=True, look_ahead=2)
        (future,) = self._runner.submit([query])
        rows = self._runner.result(query, future, "encode")
        if rows.hidden_T_D.shape[1] != self.info.hidden_size:
            raise _unsupported(
                f"The states are {rows.hidden_T_D.shape[1]} wide; the head takes {self.info.hidden_size}."
            )
        error = self._head_error(rows)
        if not error <= (1e-4 if self.info.dtype == "float32" else 3e-2):
            raise _unsupported(f"The model's logits are not head(last hidden state): relative difference {error:.1e}.")
        log.info("warm-up: the head's logits agree with the model's own to %.1e", error)

    @torch.inference_mode()
    def encode(self, batch: EncodeBatch) -> Encoded:
        """Representations of all positions ≥ `from_position` of every sequence."""
        queries = [
            TextQuery(list(ids), start, batch.with_logsumexp, tenant=batch.tenant)
            for ids, start in zip(batch.token_ids, batch.from_position, strict=True)
        ]
        futures = self._runner.submit(queries)
        wait(futures)  # for all, also after an error, so that no query is left at the model
        results = [
            (query, self._runner.result(query, future, "encode"))
            for query, future in zip(queries, futures, strict=True)
        ]
        return Encoded(
            rows=[len(rows.ran_token_ids) for _, rows in results],
            echo=[echo(query, rows) for query, rows in results],
            cr_N_D=torch.cat([rows.hidden_T_D for _, rows in results]),
            last_hidden_N_D=None,
            logsumexp_N=torch.cat([rows.logsumexp_T for _, rows in results]) if batch.with_logsumexp else None,
        )

    def evict_idle(self) -> None:
        """Remove all cached states once the oldest have passed the time limit. Any thread may call it."""
        self._runner.evict_idle()

    def drafting(self, batch_tokens: int) -> GenerationDrafting:
        """A new, empty `GenerationDrafting`. The model forms passes itself, so that `batch_tokens` has no effect."""
        return GenerationDrafting(self._runner)

    def _head_error(self, rows: TextRows) -> float:
        """Largest difference of log-sum-exp and top logit to those of the head, relative to the logits."""
        logits_T_V = self.head.logits(rows.hidden_T_D.to(self.head.weight_V_D.device)).float().cpu()
        top_logit_T = logits_T_V.gather(-1, rows.top1_T[:, None])[:, 0]
        difference_2_T = torch.stack([logits_T_V.logsumexp(dim=-1) - rows.logsumexp_T, top_logit_T - rows.top1_logit_T])
        return (difference_2_T.abs().max() / logits_T_V.abs().max().clamp(min=1e-6)).nan_to_num(torch.inf).item()


def _unsupported(problem: str) -> Unsupported:
    return Unsupported(problem, hint="This engine cannot serve this model; try --engine transformers.")

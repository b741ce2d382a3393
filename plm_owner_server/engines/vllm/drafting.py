"""Drafting on a model that drafts by itself: one query for each sequence and all tokens after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

import torch

from plm_owner_server.engines.interface import Decoded, DraftBatch
from plm_owner_server.engines.vllm.model_runner import GenerationRunner, TextQuery, TextRows
from protocol.integrity import token_crc32

# Longest wait in a step for a sequence to end, so that other batches can join.
_STEP_SECONDS = 0.02

_Submitted = list[tuple[TextQuery, Future[TextRows]]]


class GenerationDrafting:
    """Batches that the model drafts at the same time; it decides which tokens share a pass.

    Args:
        runner: sends the queries.
    """

    def __init__(self, runner: GenerationRunner) -> None:
        self._runner = runner
        self._batches: dict[DraftBatch, _Submitted] = {}

    def join(self, batches: Sequence[DraftBatch]) -> int:
        """Submit batches. Return the number of their prompts' tokens, of which the model runs those not cached.

        After an error no query is left at the model.
        """
        with self._leaving_all_after_error():
            for batch in batches:
                queries = _queries(batch)
                self._batches[batch] = list(zip(queries, self._runner.submit(queries), strict=True))
        return sum(len(ids) for batch in batches for ids in batch.token_ids)

    def step(self) -> list[tuple[DraftBatch, Decoded]]:
        """Wait a moment for sequences to end. Return the batches that are now complete, with results.

        After an error no query is left at the model.
        """
        with self._leaving_all_after_error():
            self._runner.wait(
                [future for submitted in self._batches.values() for _, future in submitted if not future.done()],
                _STEP_SECONDS,
            )
            complete = [
                batch for batch, submitted in self._batches.items() if all(future.done() for _, future in submitted)
            ]
            return [(batch, self._decoded(self._batches.pop(batch))) for batch in complete]

    def leave(self, batch: DraftBatch) -> None:
        """Remove a batch whose client has disconnected. The model ends its work on it."""
        for _, future in self._batches.pop(batch, []):
            future.cancel()

    @contextmanager
    def _leaving_all_after_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            for batch in list(self._batches):
                self.leave(batch)
            raise

    def _decoded(self, submitted: _Submitted) -> Decoded:
        results = [(query, self._runner.result(query, future, "step")) for query, future in submitted]
        logsumexp_N = torch.cat([rows.logsumexp_T for _, rows in results])
        return Decoded(
            rows=[len(rows.ran_token_ids) for _, rows in results],
            echo=[echo(query, rows) for query, rows in results],
            cr_N_D=torch.cat([rows.hidden_T_D for _, rows in results]),
            last_hidden_N_D=None,
            logsumexp_N=logsumexp_N,
            top1_N=torch.cat([rows.top1_T for _, rows in results]),
            top1_logprob_N=torch.cat([rows.top1_logit_T for _, rows in results]) - logsumexp_N,
        )


def echo(query: TextQuery, rows: TextRows) -> int:
    """CRC-32 of the text as the model received it, as far as its positions are requested."""
    ran = rows.ran_token_ids[: len(query.token_ids) - query.start]
    return token_crc32([*query.token_ids[: query.start], *ran])


def _queries(batch: DraftBatch) -> list[TextQuery]:
    return [
        TextQuery(list(ids), start, True, look_ahead, batch.stop_token_ids, batch.tenant)
        for ids, start, look_ahead in zip(batch.token_ids, batch.from_position, batch.look_ahead, strict=True)
    ]

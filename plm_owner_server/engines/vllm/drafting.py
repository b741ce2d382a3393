"""Greedy drafting on a model that returns the newest position's state and caches what it computed before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from plm_owner_server.engines.draft_state import DraftSequence, DraftState, record_pass
from plm_owner_server.engines.interface import Decoded, DraftBatch, PassKind
from plm_owner_server.engines.ops.vocab_reduction import VocabReduction
from plm_owner_server.engines.vllm.model_runner import PooledRunner, PositionRange
from protocol.integrity import token_crc32


@dataclass(eq=False)
class _Sequence(DraftSequence):
    """One sequence of a batch.

    Attributes:
        echo: CRC-32 of the prompt as the model received it; None before it was run.
    """

    echo: int | None = None


class PooledDrafting:
    """Batches that are drafted together, one token of each sequence per step.

    Between steps only token ids and results are held. Every step requests the newest position of the whole text, of
    which the model has all blocks but the last cached.

    Args:
        runner: runs the texts.
        vocab: reductions over the logits of the model's LM head.
    """

    def __init__(self, runner: PooledRunner, vocab: VocabReduction) -> None:
        self._runner = runner
        self._vocab = vocab
        self._states: dict[DraftBatch, DraftState[_Sequence]] = {}

    @torch.inference_mode()
    def join(self, batches: Sequence[DraftBatch]) -> int:
        """Add batches and run the parts of their prompts that are not cached. Return the number of tokens run."""
        joining = {batch: DraftState(batch, _Sequence) for batch in batches}
        ran = self._run(joining.values(), "prompt")
        self._states |= joining
        return ran

    @torch.inference_mode()
    def step(self) -> list[tuple[DraftBatch, Decoded]]:
        """Draft one token for every unfinished sequence. Return the batches that are now complete, with results."""
        self._run(self._states.values(), "step")
        complete = [state for state in self._states.values() if state.is_complete]
        return [(state.batch, _result(self._states.pop(state.batch))) for state in complete]

    def leave(self, batch: DraftBatch) -> None:
        """Remove a batch whose client has disconnected."""
        self._states.pop(batch, None)

    def _run(self, states: Iterable[DraftState[_Sequence]], kind: PassKind) -> int:
        """Run the unfinished sequences, and append to each the token that it chose. Return the number of tokens run."""
        unfinished = [sequence for state in states for sequence in state.sequences if not sequence.is_finished]
        if not unfinished:
            return 0
        ranges = [PositionRange(list(s.token_ids), s.next_position, s.state.batch.tenant) for s in unfinished]
        results, ran = self._runner.run(ranges, kind)
        cr_N_D = torch.cat([result.hidden_T_D for result in results])
        logsumexp_N, top1_N, top1_logit_N = self._vocab.reduce_from_host(cr_N_D)
        newest = record_pass(unfinished, (cr_N_D, logsumexp_N, top1_N, top1_logit_N - logsumexp_N))
        for sequence, result, row in zip(unfinished, results, newest, strict=True):
            if sequence.echo is None:
                sequence.echo = token_crc32(result.token_ids)
            sequence.accept(int(top1_N[row]))
        return ran


def _result(state: DraftState[_Sequence]) -> Decoded:
    return state.decoded(state.columns(), [s.echo for s in state.sequences if s.echo is not None])

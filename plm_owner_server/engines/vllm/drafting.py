"""Greedy drafting on a model that gives the newest position's state and keeps what it computed before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from plm_owner_server.engines.interface import Decoded, DraftBatch, PassKind
from plm_owner_server.engines.ops.vocab_reduction import VocabReduction
from plm_owner_server.engines.vllm.model_runner import PooledRunner, PositionRange
from protocol.integrity import echo


@dataclass(eq=False)
class _Sequence:
    """One sequence of a batch.

    Attributes:
        token_ids: the prompt, and the drafts that were run or are run next.
        start: first position wanted that is not known yet.
        last: tokens that it may have at most.
        tenant: whose it is.
        echo: of the prompt that was really run.
        noted: columns of its positions so far: CRs, log-sum-exp, top-1, its log-probability.
        going_on: whether it is still drafted.
    """

    token_ids: list[int]
    start: int
    last: int
    tenant: str
    echo: int | None = None
    noted: list[tuple[Tensor, ...]] = field(default_factory=list)
    going_on: bool = True


class PooledDrafting:
    """Batches that are drafted together, one token of each sequence a step.

    Nothing is held between steps but token ids and results: every step asks for the newest position of the whole text,
    of which the model knows all but the last block.

    Args:
        runner: runs the texts.
        vocabulary: as the LM head sees it.
    """

    def __init__(self, runner: PooledRunner, vocabulary: VocabReduction) -> None:
        self._runner = runner
        self._vocabulary = vocabulary
        self._batches: dict[DraftBatch, list[_Sequence]] = {}

    @torch.inference_mode()
    def join(self, batches: Sequence[DraftBatch]) -> int:
        """Take batches in, and run their prompts as far as they are not known; the number of tokens run."""
        joining = {
            batch: [
                _Sequence(list(ids), start, len(ids) + look_ahead, batch.tenant)
                for ids, start, look_ahead in zip(batch.token_ids, batch.from_position, batch.look_ahead, strict=True)
            ]
            for batch in batches
        }
        ran = self._run(joining, "prompt")
        self._batches |= joining
        return ran

    @torch.inference_mode()
    def step(self) -> list[tuple[DraftBatch, Decoded]]:
        """Draft one more token of every sequence that goes on; what has become of batches of which none does."""
        self._run(self._batches, "step")
        ended = [batch for batch, own in self._batches.items() if not any(sequence.going_on for sequence in own)]
        return [(batch, _result(self._batches.pop(batch))) for batch in ended]

    def leave(self, batch: DraftBatch) -> None:
        """Let go of a batch that nobody waits for any more."""
        self._batches.pop(batch, None)

    def _run(self, batches: dict[DraftBatch, list[_Sequence]], kind: PassKind) -> int:
        """Run the sequences that go on, and append to each what it chose; those that chose a stop token end."""
        going_on = [(batch, sequence) for batch, own in batches.items() for sequence in own if sequence.going_on]
        if not going_on:
            return 0
        answers, ran = self._runner.run([PositionRange(s.token_ids, s.start, s.tenant) for _, s in going_on], kind)
        cr_N_D = torch.cat([answer.hidden_T_D for answer in answers])
        logsumexp_N, top1_N, top1_logit_N = self._vocabulary.reduce_from_host(cr_N_D)
        columns = (cr_N_D, logsumexp_N, top1_N, top1_logit_N - logsumexp_N)
        rows = [len(answer.hidden_T_D) for answer in answers]
        parts = zip(*(column.split(rows) for column in columns), strict=True)
        for (batch, sequence), answer, part in zip(going_on, answers, parts, strict=True):
            if sequence.echo is None:
                sequence.echo = echo(answer.token_ids)
            sequence.noted.append(part)
            sequence.start = len(sequence.token_ids)
            token = int(part[2][-1])
            sequence.going_on = sequence.start < sequence.last and token not in batch.stop_token_ids
            if sequence.going_on:
                # Another list: what was run is what the model was given.
                sequence.token_ids = [*sequence.token_ids, token]
        return ran


def _result(sequences: Sequence[_Sequence]) -> Decoded:
    """All positions, sequence by sequence."""
    noted = [part for sequence in sequences for part in sequence.noted]
    cr_N_D, logsumexp_N, top1_N, top1_logprob_N = (torch.cat(column) for column in zip(*noted, strict=True))
    return Decoded(
        rows=[sum(len(part[0]) for part in sequence.noted) for sequence in sequences],
        echo=[sequence.echo for sequence in sequences if sequence.echo is not None],
        cr_N_D=cr_N_D,
        last_hidden_N_D=None,
        logsumexp_N=logsumexp_N,
        top1_N=top1_N,
        top1_logprob_N=top1_logprob_N,
    )

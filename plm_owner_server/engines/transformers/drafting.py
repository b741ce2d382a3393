"""Greedy drafting of sequences of several requests together, one token of each a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from plm_owner_server.engines.batching import plan_batches
from plm_owner_server.engines.interface import Decoded, DraftBatch
from plm_owner_server.engines.ops.to_host import to_host
from plm_owner_server.engines.ops.vocab_reduction import VocabReduction
from plm_owner_server.engines.transformers.kv_cache import AlignedCache
from plm_owner_server.engines.transformers.model_runner import WORTH_A_PASS, ForwardPass, ModelRunner
from protocol.integrity import echo


@dataclass(eq=False)
class _Batch:
    """A batch while it is drafted.

    Attributes:
        asked: what was asked for.
        noted: of each pass that it took part in, the positions wanted: CRs, log-sum-exp, top-1, its log-probability
            and, where it is something else, the head's input.
        going_on: sequences that are still drafted.
    """

    asked: DraftBatch
    sequences: list[_Sequence] = field(default_factory=list)
    noted: list[tuple[Tensor, ...]] = field(default_factory=list)
    going_on: int = 0


@dataclass(eq=False)
class _Sequence:
    """One sequence of a batch.

    Attributes:
        token_ids: the prompt, and the drafts that were run or are run next.
        prompt: tokens of the prompt.
        start: first position wanted.
        last: tokens that it may have at most.
        known: tokens whose states were kept before.
        places: of each wanted position so far, its pass among the batch's and its row in that one's columns.
        prompt_run: the tokens [T] of its row in the pass that ran the end of the prompt, padding included, and the
            position of the first.
    """

    batch: _Batch
    token_ids: list[int]
    prompt: int
    start: int
    last: int
    known: int
    places: list[tuple[int, int]] = field(default_factory=list)
    prompt_run: tuple[Tensor, int] | None = None


class BatchedDrafting:
    """Batches that are drafted together.

    A sequence ends after a stop token, which is its last top-1 then and is not run itself, or when it has as many
    drafts as were asked for; it leaves at once, and the others stay where they are.

    What decides about the next step is kept on the host, so that a step waits for the device once: for the tokens that
    the last one chose.

    Args:
        runner: runs the model.
        vocabulary: as its LM head sees it.
        batch_tokens: tokens of prompts, padding included, in one pass.
        with_last_hidden: give the head's input, too, as the CRs are something else.
    """

    def __init__(
        self, runner: ModelRunner, vocabulary: VocabReduction, *, batch_tokens: int, with_last_hidden: bool
    ) -> None:
        self._runner = runner
        self._vocabulary = vocabulary
        self._batch_tokens = batch_tokens
        self._with_last_hidden = with_last_hidden
        self._cache = AlignedCache()
        self._rows: list[_Sequence] = []  # of the cache
        # Tokens that the device has chosen, and the sequences to go on with them: the host does not know them yet.
        self._chosen: list[tuple[Tensor, list[_Sequence]]] = []
        self._ended: list[_Batch] = []

    @torch.inference_mode()
    def join(self, batches: Sequence[DraftBatch]) -> int:
        """Take batches in, and run their prompts as far as they are not known; the number of tokens run."""
        entering: list[_Sequence] = []
        states: list[list[Tensor]] = []
        ran = 0
        for asked in batches:
            batch = _Batch(asked, going_on=len(asked.token_ids))
            known, ran_once = self._runner.known_states(
                asked.tenant, asked.token_ids, asked.from_position, self._batch_tokens
            )
            ran += ran_once
            for ids, start, look_ahead, own in zip(
                asked.token_ids, asked.from_position, asked.look_ahead, known, strict=True
            ):
                kept = sum(map(len, own))
                batch.sequences.append(_Sequence(batch, list(ids), len(ids), start, len(ids) + look_ahead, kept))
            entering += batch.sequences
            states += known
        # Those of which only the last token is not known can take part in the next step as they are.
        ready = [i for i, s in enumerate(entering) if s.prompt - s.known == 1 and s.known]
        others = [i for i in range(len(entering)) if i not in set(ready)]
        needed = [entering[i].prompt - entering[i].known for i in others]
        plan = plan_batches(needed, self._batch_tokens, WORTH_A_PASS)
        for group in plan:
            chosen = [others[i] for i in group]
            self._prefill([entering[i] for i in chosen], [states[i] for i in chosen])
        if ready:
            recalled = self._runner.recall([states[i] for i in ready], [entering[i].known for i in ready])
            self._take_in([entering[i] for i in ready], recalled)
        return ran + sum(len(group) * max(needed[i] for i in group) for group in plan)

    @torch.inference_mode()
    def step(self) -> list[tuple[DraftBatch, Decoded]]:
        """Draft one more token of every sequence that goes on; what has become of batches of which none does."""
        self._decide()
        if self._rows:
            lengths = [len(sequence.token_ids) for sequence in self._rows]
            self._cache.trim(max(lengths) - 1)
            run = self._runner.step([sequence.token_ids[-1] for sequence in self._rows], lengths, self._cache)
            self._note(run, self._rows)
            # From the last row on: where all leave, none moves.
            for sequence in [s for s in reversed(self._rows) if len(s.token_ids) == s.last]:
                self._leave(sequence)
        ended, self._ended = self._ended, []
        return [(batch.asked, self._result(batch)) for batch in ended]

    @torch.inference_mode()
    def leave(self, batch: DraftBatch) -> None:
        """Let go of a batch that nobody waits for any more."""
        for sequence in [s for s in reversed(self._rows) if s.batch.asked is batch]:
            self._remove(sequence)
        self._ended = [ended for ended in self._ended if ended.asked is not batch]

    def _prefill(self, entering: Sequence[_Sequence], known: Sequence[Sequence[Tensor]]) -> None:
        run, cache = self._runner.prefill([sequence.token_ids for sequence in entering], known)
        self._note(run, entering)
        staying = []
        for row, sequence in enumerate(entering):
            if len(sequence.token_ids) < sequence.last:
                staying.append(row)
            else:
                self._keep(sequence, cache, row)
                self._end(sequence)
        if staying:
            if len(staying) < len(entering):
                cache.select(self._runner.send(torch.tensor(staying)))
            self._take_in([entering[row] for row in staying], cache)

    def _take_in(self, sequences: Sequence[_Sequence], cache: AlignedCache) -> None:
        self._cache.join(cache)
        self._rows += sequences

    def _note(self, run: ForwardPass, sequences: Sequence[_Sequence]) -> None:
        """Note the positions wanted of a pass, and what it chose for those that go on."""
        places, newest = list[int](), list[int]()
        rows: dict[_Batch, list[int]] = {}  # of each batch, among the places
        for row, sequence in enumerate(sequences):
            if sequence.prompt_run is None:
                sequence.prompt_run = run.token_ids_B_T[row], run.first[row]
            own = rows.setdefault(sequence.batch, [])
            start = sequence.start + len(sequence.places)
            wanted = run.places(row, start, len(sequence.token_ids))
            sequence.places += [(len(sequence.batch.noted), len(own) + i) for i in range(len(wanted))]
            own += range(len(places), len(places) + len(wanted))
            places += wanted
            newest.append(len(places) - 1)
        columns = self._columns(run, places)
        for batch, own in rows.items():
            # Its own rows alone: it may be drafted long after the others.
            own_N = self._runner.send(torch.tensor(own))
            batch.noted.append(columns if len(rows) == 1 else tuple(c.index_select(0, own_N) for c in columns))
        going_on = [row for row, sequence in enumerate(sequences) if len(sequence.token_ids) < sequence.last]
        if going_on:
            rows_A = self._runner.send(torch.tensor([newest[row] for row in going_on]))
            self._chosen.append((columns[2].index_select(0, rows_A), [sequences[row] for row in going_on]))

    def _columns(self, run: ForwardPass, places: Sequence[int]) -> tuple[Tensor, ...]:
        places_N = self._runner.send(torch.tensor(places))
        cr_N_D = run.cr_B_T_D.flatten(0, 1).index_select(0, places_N)
        last_hidden = [run.last_hidden_B_T_D.flatten(0, 1).index_select(0, places_N)] if self._with_last_hidden else []
        logsumexp_N, top1_N, top1_logit_N = self._vocabulary.logsumexp_top1(*(last_hidden or [cr_N_D]))
        return (cr_N_D, logsumexp_N, top1_N, top1_logit_N - logsumexp_N, *last_hidden)

    def _decide(self) -> None:
        """Learn what the last passes chose; who chose a stop token leaves."""
        if not self._chosen:
            return  # so nobody need wait for tokens
        (top1_A,) = to_host(torch.cat([tokens for tokens, _ in self._chosen]))
        sequences = [sequence for _, own in self._chosen for sequence in own]
        self._chosen = []
        staying = set(self._rows)
        for sequence, token in zip(sequences, top1_A.tolist(), strict=True):
            if sequence not in staying:
                continue
            if token in sequence.batch.asked.stop_token_ids:
                self._leave(sequence)
            else:
                sequence.token_ids.append(token)

    def _leave(self, sequence: _Sequence) -> None:
        self._keep(sequence, self._cache, self._rows.index(sequence))
        self._remove(sequence)
        self._end(sequence)

    def _keep(self, sequence: _Sequence, cache: AlignedCache, row: int) -> None:
        self._runner.keep(sequence.batch.asked.tenant, sequence.token_ids, cache, row, sequence.known)

    def _remove(self, sequence: _Sequence) -> None:
        row = self._rows.index(sequence)
        self._cache.remove(row)
        self._rows[row] = self._rows[-1]
        self._rows.pop()
        if not self._rows:
            self._cache = AlignedCache()  # its buffers are let go

    def _end(self, sequence: _Sequence) -> None:
        sequence.batch.going_on -= 1
        if not sequence.batch.going_on:
            self._ended.append(sequence.batch)

    def _result(self, batch: _Batch) -> Decoded:
        """All positions, sequence by sequence."""
        starts = [0, *accumulate(len(columns[0]) for columns in batch.noted)]
        order = [starts[number] + row for sequence in batch.sequences for number, row in sequence.places]
        order_N = self._runner.send(torch.tensor(order))
        columns = [torch.cat(parts).index_select(0, order_N) for parts in zip(*batch.noted, strict=True)]
        prompts = [sequence.prompt_run for sequence in batch.sequences if sequence.prompt_run is not None]
        columns.insert(0, torch.cat([ids_T for ids_T, _ in prompts]))
        ran_P, cr_N_D, logsumexp_N, top1_N, top1_logprob_N, *last_hidden = to_host(*columns)
        ran = ran_P.split([len(ids_T) for ids_T, _ in prompts])
        return Decoded(
            rows=[len(sequence.places) for sequence in batch.sequences],
            echo=[
                _echo(sequence, first, ids_T.tolist())
                for sequence, (_, first), ids_T in zip(batch.sequences, prompts, ran, strict=True)
            ],
            cr_N_D=cr_N_D,
            last_hidden_N_D=last_hidden[0] if last_hidden else None,
            logsumexp_N=logsumexp_N,
            top1_N=top1_N,
            top1_logprob_N=top1_logprob_N,
        )


def _echo(sequence: _Sequence, first: int, ran: Sequence[int]) -> int:
    """Echo of a prompt: what was known of it, then what was really run; `first` is the position of column 0."""
    known = sequence.token_ids[: max(0, first)]
    return echo([*known, *ran[max(0, -first) : sequence.prompt - first]])

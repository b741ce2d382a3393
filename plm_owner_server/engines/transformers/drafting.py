"""Greedy drafting of the sequences of several requests together, one token of each sequence per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plm_owner_server.engines.batching import plan_batches
from plm_owner_server.engines.draft_state import Columns, DraftSequence, DraftState, record_pass
from plm_owner_server.engines.interface import Decoded, DraftBatch
from plm_owner_server.engines.ops.to_host import HostCopy
from plm_owner_server.engines.ops.vocab_reduction import VocabReduction
from plm_owner_server.engines.transformers.kv_cache import AlignedCache
from plm_owner_server.engines.transformers.model_runner import MIN_SAVED_TOKENS, ForwardPass, ModelRunner
from protocol.integrity import token_crc32


@dataclass(eq=False)
class _Sequence(DraftSequence):
    """One sequence of a batch.

    Attributes:
        cached_tokens: number of its first tokens whose states were cached when it joined.
        prompt_run: token ids [T] of its row in the pass that ran the end of the prompt, padding included, and the
            position of column 0. None before that pass.
    """

    cached_tokens: int = 0
    prompt_run: tuple[Tensor, int] | None = None


class BatchedDrafting:
    """Batches that are drafted together.

    A sequence that ends leaves at once, and the others stay where they are. A step waits for the device only once, for
    the tokens that the previous pass chose: all other state that it needs is on the host. The results of a batch are on
    their way to the host while the next pass runs.

    Args:
        runner: runs the model.
        vocab: reductions over the logits of the model's LM head.
        batch_tokens: largest number of prompt tokens in one pass, padding included.
        with_last_hidden: also return the head's input, if that is not the CR.
    """

    def __init__(
        self, runner: ModelRunner, vocab: VocabReduction, *, batch_tokens: int, with_last_hidden: bool
    ) -> None:
        self._runner = runner
        self._vocab = vocab
        self._batch_tokens = batch_tokens
        self._with_last_hidden = with_last_hidden
        self._cache = AlignedCache()
        self._rows: list[_Sequence] = []  # of the cache
        # Tokens that passes have chosen, on their way to the host, with the sequences that they extend.
        self._chosen: list[tuple[HostCopy[Tensor], list[_Sequence]]] = []
        # Batches that are complete, with their prompts as they were run and their results, on their way to the host.
        self._complete: list[tuple[DraftState[_Sequence], HostCopy[*tuple[Tensor, ...]]]] = []

    @torch.inference_mode()
    def join(self, batches: Sequence[DraftBatch]) -> int:
        """Add batches and run the parts of their prompts that are not cached. Return the number of tokens run."""
        entering: list[_Sequence] = []
        states: list[list[Tensor]] = []
        ran = 0
        for batch in batches:
            cached, ran_for_cache = self._runner.cached_states(
                batch.tenant, batch.token_ids, batch.from_position, self._batch_tokens
            )
            ran += ran_for_cache
            sequences = DraftState(batch, _Sequence).sequences
            for sequence, pieces in zip(sequences, cached, strict=True):
                sequence.cached_tokens = sum(map(len, pieces))
            entering += sequences
            states += cached
        # Sequences of which only the last token is not cached take part in the next step as they are.
        ready = [i for i, s in enumerate(entering) if s.prompt_tokens - s.cached_tokens == 1 and s.cached_tokens]
        others = [i for i in range(len(entering)) if i not in set(ready)]
        missing = [entering[i].prompt_tokens - entering[i].cached_tokens for i in others]
        plan = plan_batches(missing, self._batch_tokens, MIN_SAVED_TOKENS)
        for group in plan:
            members = [others[i] for i in group]
            self._prefill([entering[i] for i in members], [states[i] for i in members])
        if ready:
            loaded = self._runner.load([states[i] for i in ready], [entering[i].cached_tokens for i in ready])
            self._add([entering[i] for i in ready], loaded)
        return ran + sum(len(group) * max(missing[i] for i in group) for group in plan)

    @torch.inference_mode()
    def step(self) -> list[tuple[DraftBatch, Decoded]]:
        """Draft one token for every unfinished sequence. Return the batches that are now complete, with results."""
        self._accept_chosen()
        if self._rows:
            lengths = [len(sequence.token_ids) for sequence in self._rows]
            self._cache.trim(max(lengths) - 1)
            run = self._runner.step([sequence.token_ids[-1] for sequence in self._rows], lengths, self._cache)
            self._record(run, self._rows)
            # From the last row on: if all sequences end, none moves.
            for sequence in [s for s in reversed(self._rows) if s.is_full]:
                self._end_row(sequence)
        complete, self._complete = self._complete, []
        return [
            (state.batch, _result(state, arrived))
            for (state, _), arrived in zip(complete, _wait([copy for _, copy in complete]), strict=True)
        ]

    @torch.inference_mode()
    def leave(self, batch: DraftBatch) -> None:
        """Remove a batch whose client has disconnected."""
        for sequence in [s for s in reversed(self._rows) if s.state.batch is batch]:
            self._remove_row(sequence)
        self._complete = [(state, copy) for state, copy in self._complete if state.batch is not batch]

    def _prefill(self, entering: Sequence[_Sequence], cached: Sequence[Sequence[Tensor]]) -> None:
        run, cache = self._runner.prefill([sequence.token_ids for sequence in entering], cached)
        self._record(run, entering)
        staying = []
        for row, sequence in enumerate(entering):
            if sequence.is_full:
                self._end(sequence, cache, row)
            else:
                staying.append(row)
        if staying:
            if len(staying) < len(entering):
                cache.select(self._index(staying))
            self._add([entering[row] for row in staying], cache)

    def _add(self, sequences: Sequence[_Sequence], cache: AlignedCache) -> None:
        self._cache.join(cache)
        self._rows += sequences

    def _record(self, run: ForwardPass, sequences: Sequence[_Sequence]) -> None:
        """Record the requested positions of a pass, and the tokens that it chose for unfinished sequences."""
        indices = list[int]()
        for row, sequence in enumerate(sequences):
            if sequence.prompt_run is None:
                sequence.prompt_run = run.token_ids_B_T[row], run.first_position[row]
            indices += run.flat_positions(row, sequence.next_position, len(sequence.token_ids))
        columns = self._columns(run, indices)
        newest = record_pass(sequences, columns, self._index)
        unfinished = [row for row, sequence in enumerate(sequences) if not sequence.is_full]
        if unfinished:
            newest_A = self._index([newest[row] for row in unfinished])
            chosen_A = columns[2].index_select(0, newest_A)
            self._chosen.append((HostCopy(chosen_A), [sequences[row] for row in unfinished]))

    def _columns(self, run: ForwardPass, indices: list[int]) -> Columns:
        indices_N = self._index(indices)
        cr_N_D = run.cr_B_T_D.flatten(0, 1).index_select(0, indices_N)
        last_hidden = [run.last_hidden_B_T_D.flatten(0, 1).index_select(0, indices_N)] if self._with_last_hidden else []
        logsumexp_N, top1_N, top1_logit_N = self._vocab.logsumexp_top1(*(last_hidden or [cr_N_D]))
        return (cr_N_D, logsumexp_N, top1_N, top1_logit_N - logsumexp_N, *last_hidden)

    def _accept_chosen(self) -> None:
        """Append the tokens that the last passes chose, and remove the sequences that end with them."""
        tokens = [token for (top1_A,) in _wait([copy for copy, _ in self._chosen]) for token in top1_A.tolist()]
        sequences = [sequence for _, members in self._chosen for sequence in members]
        self._chosen = []
        present = set(self._rows)
        for sequence, token in zip(sequences, tokens, strict=True):
            if sequence not in present:
                continue
            sequence.accept(token)
            if sequence.is_finished:
                self._end_row(sequence)

    def _end_row(self, sequence: _Sequence) -> None:
        self._end(sequence, self._cache, self._rows.index(sequence))
        self._remove_row(sequence)

    def _end(self, sequence: _Sequence, cache: AlignedCache, row: int) -> None:
        state = sequence.state
        self._runner.store(state.batch.tenant, sequence.token_ids, cache, row, sequence.cached_tokens)
        sequence.is_finished = True
        if state.is_complete:
            prompts = [ids_T for ids_T, _ in _prompt_runs(state)]
            self._complete.append((state, HostCopy(torch.cat(prompts), *state.columns(self._index))))

    def _remove_row(self, sequence: _Sequence) -> None:
        row = self._rows.index(sequence)
        self._cache.remove(row)
        self._rows[row] = self._rows[-1]
        self._rows.pop()
        if not self._rows:
            self._cache = AlignedCache()  # frees the buffers

    def _index(self, indices: list[int]) -> Tensor:
        return self._runner.to_device(torch.tensor(indices))


def _wait(copies: Sequence[HostCopy[*tuple[Tensor, ...]]]) -> list[tuple[Tensor, ...]]:
    """Tensors of each copy, in the order of the copies. The host waits once, for the newest of them."""
    return [copy.wait() for copy in reversed(copies)][::-1]


def _prompt_runs(state: DraftState[_Sequence]) -> list[tuple[Tensor, int]]:
    """Token ids of each prompt as they were run, and the position of the first."""
    return [sequence.prompt_run for sequence in state.sequences if sequence.prompt_run is not None]


def _result(state: DraftState[_Sequence], arrived: Sequence[Tensor]) -> Decoded:
    """Result of a batch from the prompts that were run, one after another, and the columns of all its positions."""
    ran_T, *columns = arrived
    runs = _prompt_runs(state)
    ran = ran_T.split([len(ids_T) for ids_T, _ in runs])
    return state.decoded(
        columns,
        echo=[
            _echo(sequence, first, ids_T.tolist())
            for sequence, (_, first), ids_T in zip(state.sequences, runs, ran, strict=True)
        ],
    )


def _echo(sequence: _Sequence, first: int, ran: Sequence[int]) -> int:
    """Echo of a prompt: its cached tokens, then those that were really run; `first` is the position of column 0."""
    cached = sequence.token_ids[: max(0, first)]
    return token_crc32([*cached, *ran[max(0, -first) : sequence.prompt_tokens - first]])

"""Greedy drafting of several sequences together, one token of each a step."""

from __future__ import annotations

from collections.abc import Container, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from plm_owner_server.engines.base import Decoded
from plm_owner_server.engines.runner import Runner, attention_mask
from plm_owner_server.engines.to_host import to_host
from plm_owner_server.engines.vocabulary import Vocabulary


class Drafting:
    """The positions wanted of every sequence, and up to `look_ahead` greedily drafted ones.

    A sequence's drafting ends after a stop token, which is its last top-1 then and is not run itself. The prompts run
    at once, then one token of every sequence with each `step`: whoever calls may do other work in between.

    What decides about the next step is kept on the host, so that a step waits for the device once: for the tokens that
    the last one chose.

    Args:
        runner: runs the model.
        vocabulary: as its LM head sees it.
        token_ids: the sequences.
        from_position: the first position wanted of each.
        look_ahead: the most tokens to draft, for each.
        stop_token_ids: after which a sequence has ended.
        with_last_hidden: give the head's input, too, as the CRs are something else.
    """

    @torch.inference_mode()
    def __init__(
        self,
        runner: Runner,
        vocabulary: Vocabulary,
        token_ids: Sequence[Sequence[int]],
        from_position: Sequence[int],
        look_ahead: Sequence[int],
        stop_token_ids: frozenset[int],
        *,
        with_last_hidden: bool,
    ) -> None:
        self._runner, self._vocabulary, self._token_ids = runner, vocabulary, token_ids
        self._look_ahead, self._stop_token_ids = look_ahead, stop_token_ids
        self._with_last_hidden = with_last_hidden
        most = max(look_ahead)
        state = runner.prefill(
            token_ids,
            runner.known_states(token_ids, from_position, most),
            keep_cache=runner.keeps_states or most > 0,
        )
        self._state = state
        self._drafts: list[list[int]] = [[] for _ in token_ids]
        # The sequence of each row. B shrinks: those that have ended leave once they are half of the batch.
        self._owners = list(range(len(token_ids)))
        self._active = self._owners  # those of which the last step chose a token
        # Where nothing is padded there is no need of a mask, which transformers would read on the host every step.
        self._mask_B_T = (
            runner.send(attention_mask(state.reused, state.lengths, state.token_ids_B_T.shape[1]))
            if state.is_padded
            else None
        )
        self._steps: list[tuple[Tensor, ...]] = []
        self._noted: list[int] = []  # the sequence of each position in the steps
        self._wanted = [len(ids) - start for ids, start in zip(token_ids, from_position, strict=True)]
        owners = [owner for owner, count in enumerate(self._wanted) for _ in range(count)]
        top1_N = self._read(state.last_hidden_B_T_D, state.cr_B_T_D, state.places(from_position), owners)
        self._top1_A = top1_N.index_select(0, runner.send(torch.tensor(list(accumulate(self._wanted))) - 1))

    @property
    def sequences(self) -> int:
        """How many are still being drafted."""
        return len(self._owners)

    @torch.inference_mode()
    def step(self) -> bool:
        """Draft one more token of every sequence that goes on; false once none does."""
        tokens = self._going_on()
        if not tokens:
            self._runner.keep(self._state, self._token_ids, self._drafts, list(enumerate(self._owners)))
            return False
        if 2 * len(tokens) <= len(self._owners):
            self._drop_ended(tokens)
        self._active = list(tokens)
        ids = [tokens.get(owner, 0) for owner in self._owners]
        # An ended row is carried along at any position that exists; its own may lie past the model's last.
        positions = [
            len(self._token_ids[owner]) + len(self._drafts[owner]) if owner in tokens else 0 for owner in self._owners
        ]
        for owner, token in tokens.items():
            self._drafts[owner].append(token)
        if self._mask_B_T is not None:
            self._mask_B_T = torch.cat([self._mask_B_T, self._mask_B_T.new_ones(len(ids), 1)], dim=1)
        ids_B_1, positions_B_1 = self._runner.send(torch.tensor([ids, positions])[..., None])
        last_hidden_B_1_D, cr_B_1_D = self._runner.forward(
            ids_B_1, positions_B_1, cache=self._state.cache, mask_B_T=self._mask_B_T
        )
        rows = [row for row, owner in enumerate(self._owners) if owner in tokens]
        self._top1_A = self._read(last_hidden_B_1_D, cr_B_1_D, rows, self._active)
        return True

    @torch.inference_mode()
    def result(self) -> Decoded:
        """All positions so far, sequence by sequence."""
        # From step by step to sequence by sequence.
        order = sorted(range(len(self._noted)), key=self._noted.__getitem__)
        order_N = self._runner.send(torch.tensor(order))
        columns = [torch.cat(column).index_select(0, order_N) for column in zip(*self._steps, strict=True)]
        columns.append(self._state.token_ids_B_T)
        cr_N_D, logsumexp_N, top1_N, top1_logprob_N, *last_hidden, ran_B_T = to_host(*columns)
        return Decoded(
            rows=[count + len(draft) for count, draft in zip(self._wanted, self._drafts, strict=True)],
            echo=self._state.echo(self._token_ids, ran_B_T),
            cr_N_D=cr_N_D,
            last_hidden_N_D=last_hidden[0] if last_hidden else None,
            logsumexp_N=logsumexp_N,
            top1_N=top1_N,
            top1_logprob_N=top1_logprob_N,
        )

    def _going_on(self) -> dict[int, int]:
        """The sequences to draft a token of, in the order of their rows, and these tokens."""
        wanting = [len(self._drafts[owner]) < self._look_ahead[owner] for owner in self._active]
        if not any(wanting):
            return {}  # so nobody need wait for the tokens
        (top1_A,) = to_host(self._top1_A)
        return {
            owner: token
            for owner, token, wants in zip(self._active, top1_A.tolist(), wanting, strict=True)
            if wants and token not in self._stop_token_ids
        }

    def _read(
        self, last_hidden_B_T_D: Tensor, cr_B_T_D: Tensor, places: Sequence[int], owners: Sequence[int]
    ) -> Tensor:
        """Note positions, given by their places in the flattened B · T and their sequences; their top-1 tokens."""
        places_A = self._runner.send(torch.tensor(places))
        cr_A_D = cr_B_T_D.flatten(0, 1).index_select(0, places_A)
        last_hidden = [last_hidden_B_T_D.flatten(0, 1).index_select(0, places_A)] if self._with_last_hidden else []
        logsumexp_A, top1_A, top1_logit_A = self._vocabulary.logsumexp_top1(*(last_hidden or [cr_A_D]))
        self._steps.append((cr_A_D, logsumexp_A, top1_A, top1_logit_A - logsumexp_A, *last_hidden))
        self._noted += owners
        return top1_A

    def _drop_ended(self, going_on: Container[int]) -> None:
        leaving = [(row, owner) for row, owner in enumerate(self._owners) if owner not in going_on]
        staying = [(row, owner) for row, owner in enumerate(self._owners) if owner in going_on]
        self._runner.keep(self._state, self._token_ids, self._drafts, leaving)
        rows_R = self._runner.send(torch.tensor([row for row, _ in staying]))
        if self._state.cache is not None:
            self._state.cache.batch_select_indices(rows_R)
        if self._mask_B_T is not None:
            self._mask_B_T = self._mask_B_T.index_select(0, rows_R)
        self._owners = [owner for _, owner in staying]

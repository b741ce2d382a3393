"""Greedy drafting of several sequences together, one token of each a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plm_owner_server.engines.base import Decoded
from plm_owner_server.engines.runner import Runner, attention_mask
from plm_owner_server.engines.vocabulary import logsumexp_top1
from protocol.head import LMHead


class Drafting:
    """The newest position of every sequence, and up to `look_ahead` greedily drafted ones.

    A sequence's drafting ends after a stop token, which is its last top-1 then and is not run itself. The prompts run
    at once, then one token of every sequence with each `step`: whoever calls may do other work in between.

    Args:
        runner: runs the model.
        head: its LM head.
        token_ids: the sequences.
        look_ahead: the most tokens to draft, for each.
        stop_token_ids: after which a sequence has ended.
        with_last_hidden: give the head's input, too.
    """

    @torch.inference_mode()
    def __init__(
        self,
        runner: Runner,
        head: LMHead,
        token_ids: Sequence[Sequence[int]],
        look_ahead: Sequence[int],
        stop_token_ids: frozenset[int],
        *,
        with_last_hidden: bool,
    ) -> None:
        self._runner, self._head, self._token_ids = runner, head, token_ids
        self._with_last_hidden = with_last_hidden
        device = runner.device
        most = max(look_ahead)
        state = runner.prefill(
            token_ids, runner.known_states(token_ids, most), keep_cache=runner.keeps_states or most > 0
        )
        self._state = state
        self._stop_S = torch.tensor(sorted(stop_token_ids), dtype=torch.long, device=device)
        self._drafts: list[list[int]] = [[] for _ in token_ids]
        # B shrinks: sequences that have ended leave once they are half of the batch. A row's owner is its sequence.
        self._owner_B = torch.arange(len(token_ids), device=device)
        self._active_B = torch.ones_like(self._owner_B, dtype=torch.bool)
        self._mask_B_T = attention_mask(state.reused_B, state.lengths_B, state.token_ids_B_T.shape[1])
        self._positions_B = state.reused_B + state.lengths_B
        self._left_B = torch.tensor(look_ahead, device=device)
        self._steps: list[tuple[Tensor, ...]] = []
        newest = (self._owner_B, state.lengths_B - 1)
        self._top1_B = self._read(state.last_hidden_B_T_D[newest], state.cr_B_T_D[newest])

    @property
    def sequences(self) -> int:
        """How many are still being drafted."""
        return len(self._owner_B)

    @torch.inference_mode()
    def step(self) -> bool:
        """Draft one more token of every sequence that goes on; false once none does."""
        self._active_B &= (self._left_B > 0) & ~torch.isin(self._top1_B, self._stop_S)
        remaining = int(self._active_B.sum())
        if remaining == 0:
            self._runner.keep(
                self._state, self._token_ids, self._drafts, self._owner_B, torch.ones_like(self._active_B)
            )
            return False
        if 2 * remaining <= len(self._active_B):
            self._drop_ended()
        going_on = zip(self._owner_B[self._active_B].tolist(), self._top1_B[self._active_B].tolist(), strict=True)
        for owner, token in going_on:
            self._drafts[owner].append(token)
        self._mask_B_T = torch.cat([self._mask_B_T, torch.ones_like(self._mask_B_T[:, :1])], dim=1)
        # An ended row is carried along at any position that exists; its own may lie past the model's last.
        at_B = torch.where(self._active_B, self._positions_B, 0)
        last_hidden_B_1_D, cr_B_1_D = self._runner.forward(
            self._top1_B[:, None], at_B[:, None], cache=self._state.cache, mask_B_T=self._mask_B_T
        )
        self._positions_B, self._left_B = self._positions_B + 1, self._left_B - 1
        self._top1_B = self._read(last_hidden_B_1_D[:, 0], cr_B_1_D[:, 0])
        return True

    def result(self) -> Decoded:
        """All positions so far, sequence by sequence."""
        owner_N, *parts = (torch.cat(column) for column in zip(*self._steps, strict=True))
        # From step by step to sequence by sequence.
        order_N = owner_N.argsort(stable=True)
        cr_N_D, last_hidden_N_D, logsumexp_N, top1_N, top1_logprob_N = (part[order_N].cpu() for part in parts)
        return Decoded(
            rows=owner_N.bincount(minlength=len(self._token_ids)).tolist(),
            echo=self._state.echo(self._token_ids),
            cr_N_D=cr_N_D,
            last_hidden_N_D=last_hidden_N_D if self._with_last_hidden else None,
            logsumexp_N=logsumexp_N,
            top1_N=top1_N,
            top1_logprob_N=top1_logprob_N,
        )

    def _read(self, last_hidden_B_D: Tensor, cr_B_D: Tensor) -> Tensor:
        """Note a position of every active sequence; its top-1 tokens [B], 0 for those that have ended."""
        active_B = self._active_B
        logsumexp_A, top1_A, top1_logit_A = logsumexp_top1(self._head, last_hidden_B_D[active_B])
        columns = (cr_B_D[active_B], last_hidden_B_D[active_B], logsumexp_A, top1_A, top1_logit_A - logsumexp_A)
        self._steps.append((self._owner_B[active_B], *columns))
        return torch.zeros_like(self._owner_B).masked_scatter(active_B, top1_A)

    def _drop_ended(self) -> None:
        active_B = self._active_B
        self._runner.keep(self._state, self._token_ids, self._drafts, self._owner_B, ~active_B)
        if self._state.cache is not None:
            self._state.cache.batch_select_indices(active_B.nonzero()[:, 0])
        self._mask_B_T, self._positions_B, self._left_B = (
            self._mask_B_T[active_B],
            self._positions_B[active_B],
            self._left_B[active_B],
        )
        self._owner_B, self._top1_B = self._owner_B[active_B], self._top1_B[active_B]
        self._active_B = active_B[active_B]

"""The PLM's most probable token among those of a held answer that are neither candidates nor the PLM's top-1."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property

import torch
from torch import Tensor

from data_owner_client.plm.remote_plm import RemotePlm
from protocol.errors import Forbidden
from protocol.head import LMHead

# Rows of the LM head that are requested for one position. Owners bound how many a client may ever have.
_MAX_ROWS = 256
# Most probable tokens of one request. More of them would count against the owner's budget of full distributions.
_MAX_TOKENS = 100


class TokenSearch:
    """Searches the allowed tokens of one generation, by what the owner grants.

    Few tokens are compared by their head rows, which are cached. Of many, the most probable ones of the PLM are
    requested, and an allowed one is nearly always among them. The whole LM head decides where none is.

    Args:
        plm: the PLM.
    """

    def __init__(self, plm: RemotePlm) -> None:
        self._plm = plm

    def most_probable(
        self, allowed_V: Tensor, h_D: Tensor, logsumexp: float, context: Sequence[int]
    ) -> tuple[int, float] | None:
        """The PLM's most probable allowed token, with log P_PLM; None where the owner grants nothing that tells.

        Args:
            allowed_V: True for each allowed token, bool [V].
            h_D: input of the LM head at the position.
            logsumexp: log-sum-exp of all logits.
            context: token ids before the position.
        """
        ids = allowed_V.nonzero()[:, 0]
        if len(ids) <= _MAX_ROWS and self._plm.card.head_policy != "none":
            with suppress(Forbidden):  # the budget of rows is spent
                return _best(self._plm.few_head_rows(ids), ids, h_D, logsumexp)
        if self._plm.grants("distribution"):
            with suppress(Forbidden):
                token_ids_K, logprob_K = self._plm.most_probable(context, min(_MAX_TOKENS, len(allowed_V)))
                allowed = allowed_V[token_ids_K].nonzero()[:, 0].tolist()
                if allowed:
                    return int(token_ids_K[allowed[0]]), float(logprob_K[allowed[0]])
        if self._plm.card.head_policy == "full":
            return _best(self._head.rows(ids).to(torch.float32), ids, h_D, logsumexp)
        return None

    @cached_property
    def _head(self) -> LMHead:
        return self._plm.full_head()


def _best(head: LMHead, ids_K: Tensor, h_D: Tensor, logsumexp: float) -> tuple[int, float]:
    logits_K = head.logits(h_D[None])[0]
    index = int(logits_K.argmax())
    return int(ids_K[index]), float(logits_K[index]) - logsumexp

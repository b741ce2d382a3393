"""The PLM's log-probabilities of given tokens, from their LM-head rows."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from data_owner_client.plm.remote_plm import RemotePlm
from protocol.head import LMHead

# Bytes of the rows that are kept.
_CACHE_BYTES = 64 * 2**20


def token_logprobs(head: LMHead, input_N_D: Tensor, logsumexp_N: Tensor, index_N: Tensor) -> Tensor:
    """log P_PLM of one token at each position, float64 [N].

    Args:
        head: LM-head rows of some tokens.
        input_N_D: inputs of the LM head.
        logsumexp_N: log-sum-exp of all logits.
        index_N: int64, row of `head` that belongs to each position's token.
    """
    parts = []
    chunk = head.rows_per_chunk()
    for input_B_D, index_B in zip(input_N_D.split(chunk), index_N.split(chunk), strict=True):
        parts.append(head.logits(input_B_D.float()).gather(1, index_B[:, None])[:, 0].double())
    return (torch.cat(parts) - logsumexp_N.double()).clamp(max=0.0)


class HeadRowCache:
    """LM-head rows by token. Owners count the rows that they give, so the newest are kept. Any thread may use it.

    Args:
        plm: the PLM.
        max_bytes: size of the rows that are kept, in bytes.
    """

    def __init__(self, plm: RemotePlm, max_bytes: int = _CACHE_BYTES) -> None:
        self._plm = plm
        self._capacity = max(1, max_bytes // (4 * plm.card.hidden_size))
        self._rows = OrderedDict[int, LMHead]()
        self._lock = threading.Lock()

    def rows(self, token_ids: Sequence[int]) -> LMHead:
        """The LM head's rows of these tokens, one at least, in float32.

        Raises:
            PemaError: as `RemotePlm.head_rows`.
        """
        with self._lock:
            missing = [token for token in dict.fromkeys(token_ids) if token not in self._rows]
            if missing:
                head = self._plm.head_rows(torch.tensor(missing))
                # Copies, as a view of one row would keep all of them in memory.
                self._rows |= {token: head.rows(torch.tensor([row])) for row, token in enumerate(missing)}
            found = [self._rows[token] for token in token_ids]
            for token in token_ids:
                self._rows.move_to_end(token)
            while len(self._rows) > self._capacity:
                self._rows.popitem(last=False)
        return joined(found)


def joined(heads: Sequence[LMHead]) -> LMHead:
    """The rows of several parts of one LM head, one after another."""
    first = heads[0]
    bias_V = None if first.bias_V is None else torch.cat([head.bias_V for head in heads if head.bias_V is not None])
    weight_V_D = torch.cat([head.weight_V_D for head in heads])
    return LMHead(weight_V_D, bias_V, first.logit_scale, first.softcap)

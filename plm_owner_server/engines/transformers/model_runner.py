"""From token ids to hidden states: forward passes of a causal language model without its head.

Padding, shared prefixes and known states are dealt with here, so that nobody else has to.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plm_owner_server.engines.batching import common_prefix, duplicate_groups, plan_batches
from plm_owner_server.engines.interface import EngineStats
from plm_owner_server.engines.transformers.kv_cache import AlignedCache, KvLayout
from plm_owner_server.engines.transformers.prefix_cache import PrefixCache
from protocol.errors import ServerFault, Unsupported

# Tokens that a pass of its own must save: about what a pass costs.
WORTH_A_PASS = 64
_FFN_NAMES = ("mlp", "feed_forward", "feedforward", "ffn", "block_sparse_moe", "moe", "fc2")


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """What one forward pass has computed.

    Attributes:
        token_ids_B_T: what was run, padding included.
        first: the position of each sequence's column 0; negative where the row begins with padding.
    """

    last_hidden_B_T_D: Tensor
    cr_B_T_D: Tensor
    token_ids_B_T: Tensor
    first: list[int]

    def places(self, row: int, start: int, stop: int) -> range:
        """Where in the flattened B · T a sequence's positions [start, stop) are."""
        origin = row * self.token_ids_B_T.shape[1] - self.first[row]
        return range(origin + start, origin + stop)


class ModelRunner:
    """Runs the body of a model.

    Args:
        model: in evaluation mode, on its device.
        ffn_output: also give the last block's feed-forward output as the representation.
        prefix_cache_bytes: bound on the attention states kept for texts that begin alike or go on; 0 keeps none.
        prefix_cache_seconds: how long they are kept after their last use.

    Attributes:
        counts: what it has done.

    Raises:
        Unsupported: the model has no feed-forward layer that could be found.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        ffn_output: bool,
        prefix_cache_bytes: int,
        prefix_cache_seconds: float = math.inf,
    ) -> None:
        self._base = model.base_model
        self._accepts = set(inspect.signature(self._base.forward).parameters)
        self._ffn = _last_ffn(self._base) if ffn_output else None
        self._prefixes = PrefixCache(prefix_cache_bytes, prefix_cache_seconds) if prefix_cache_bytes else None
        self._layout: KvLayout | None = None  # known once states were kept
        self.counts = EngineStats()

    @property
    def device(self) -> torch.device:
        """Where the model's input goes."""
        return self._base.get_input_embeddings().weight.device  # type: ignore[no-any-return]

    def send(self, host: Tensor) -> Tensor:
        """A tensor of the host on the device, without waiting for what runs there."""
        if self.device.type != "cuda":
            return host.to(self.device)
        # A copy from memory that is not pinned waits for the device.
        return host.pin_memory().to(self.device, non_blocking=True)

    def shared_states(self, tenant: str, token_ids: Sequence[Sequence[int]], *, at_most: int) -> list[Tensor]:
        """States [T_i, F] of what all sequences begin with; computed once for all, if that saves more than it costs."""
        if self._prefixes is None:
            return []
        shared = min(common_prefix(token_ids), min(map(len, token_ids)) - 1, at_most)
        prefix = list(token_ids[0][:shared])
        states = self._prefixes.match(tenant, prefix)
        if (shared - _tokens(states)) * (len(token_ids) - 1) >= WORTH_A_PASS:
            (states,) = self._computed(tenant, [prefix], [states])
        return states

    def _computed(
        self, tenant: str, prefixes: Sequence[list[int]], known: Sequence[list[Tensor]]
    ) -> list[list[Tensor]]:
        """All states of some beginnings, of which the first are known; in one pass."""
        _, cache = self.prefill(prefixes, known)
        states = []
        for row, (prefix, own) in enumerate(zip(prefixes, known, strict=True)):
            missing = len(prefix) - _tokens(own)
            self.keep(tenant, prefix, cache, row, len(prefix) - missing)
            # Not asked of what is kept: it may have had no room.
            states.append([*own, cache.states(row, -missing, 0)])
        return states

    def known_states(
        self, tenant: str, token_ids: Sequence[Sequence[int]], from_position: Sequence[int], batch_tokens: int
    ) -> tuple[list[list[Tensor]], int]:
        """States of each sequence's longest known prefix before `from_position`.

        What all of them begin with is known, too, and what is the same up to there in some, as draws of one prompt are:
        it is computed once for all, if that saves more than it costs.

        Returns:
            The states of each; and how many tokens were run for what is the same in some, padding included, of which
            no pass has more than `batch_tokens`.
        """
        if self._prefixes is None:
            return [[] for _ in token_ids], 0
        shared = self.shared_states(tenant, token_ids, at_most=min(from_position))
        before = [list(ids[:at]) for ids, at in zip(token_ids, from_position, strict=True)]
        known = [max(self._prefixes.match(tenant, ids), shared, key=_tokens) for ids in before]
        groups = duplicate_groups(before, [_tokens(states) for states in known], WORTH_A_PASS)
        needed = [len(before[first]) - _tokens(known[first]) for first, *_ in groups]
        plan = plan_batches(needed, batch_tokens, WORTH_A_PASS)
        for batch in plan:
            firsts = [groups[i][0] for i in batch]
            computed = self._computed(tenant, [before[i] for i in firsts], [known[i] for i in firsts])
            for i, states in zip(batch, computed, strict=True):
                for index in groups[i]:
                    known[index] = states
        return known, sum(len(batch) * max(needed[i] for i in batch) for batch in plan)

    def keep(self, tenant: str, token_ids: Sequence[int], cache: AlignedCache, row: int, known: int) -> None:
        """Keep the states of a sequence: the next call may go on from there.

        Args:
            tenant: to whom it belongs.
            token_ids: all that was run of it, and what was known before.
            cache: where its states are.
            row: its row there.
            known: number of its first states that were kept before.
        """
        if self._prefixes is None or known >= len(token_ids):
            return
        if self._layout is None:
            self._layout = KvLayout.of(cache)
        self._prefixes.insert(tenant, token_ids, cache.states(row, known - len(token_ids), 0))
        self.counts.kept_bytes = self._prefixes.size_bytes

    def forget_unused(self) -> None:
        """Drop what is known of texts that were not asked about for long."""
        if self._prefixes is not None:
            self._prefixes.drop_unused()
            self.counts.kept_bytes = self._prefixes.size_bytes

    def recall(self, known: Sequence[Sequence[Tensor]], lengths: Sequence[int]) -> AlignedCache:
        """A cache with the first so many known states of each sequence."""
        if self._layout is None or not any(lengths):
            return AlignedCache()
        self.counts.known_tokens += sum(lengths)
        return self._layout.unpack(known, lengths)

    def encode(self, token_ids: Sequence[Sequence[int]], shared: Sequence[Tensor]) -> ForwardPass:
        """Run sequences that all begin with the same known states, padded on the right.

        There is no need of a mask: with causal attention no position sees what stands to its right.
        """
        reused = _tokens(shared)
        cache = self.recall([shared] * len(token_ids), [reused] * len(token_ids)) if reused else None
        ids_B_T = nn.utils.rnn.pad_sequence([torch.tensor(ids[reused:]) for ids in token_ids], batch_first=True)
        self.counts.note("encode", sum(len(ids) - reused for ids in token_ids), ids_B_T.numel())
        return self._pass(ids_B_T, [reused] * len(token_ids), cache)

    def prefill(
        self, token_ids: Sequence[Sequence[int]], known: Sequence[Sequence[Tensor]]
    ) -> tuple[ForwardPass, AlignedCache]:
        """Run sequences up to their last token, padded on the left, and keep all states to go on from.

        All run equally many tokens: who would need fewer runs known ones again, which costs no more than padding.
        """
        lengths = [len(ids) for ids in token_ids]
        steps = max(length - _tokens(states) for length, states in zip(lengths, known, strict=True))
        reused = [max(0, length - steps) for length in lengths]
        cache = self.recall(known, reused)
        ids_B_T = nn.utils.rnn.pad_sequence(
            [torch.tensor(ids[-steps:]) for ids in token_ids], batch_first=True, padding_side="left"
        )
        self.counts.note("prompt", sum(min(length, steps) for length in lengths), ids_B_T.numel())
        return self._pass(ids_B_T, [length - steps for length in lengths], cache, lengths), cache

    def step(self, token_ids: Sequence[int], lengths: Sequence[int], cache: AlignedCache) -> ForwardPass:
        """Run one more token of every sequence in the cache.

        Args:
            token_ids: of each.
            lengths: of the sequences, that token included.
            cache: takes the new states in.
        """
        self.counts.note("step", len(token_ids), len(token_ids))
        return self._pass(torch.tensor(token_ids)[:, None], [length - 1 for length in lengths], cache, lengths)

    def _pass(
        self, ids_B_T: Tensor, first: list[int], cache: AlignedCache | None, lengths: Sequence[int] | None = None
    ) -> ForwardPass:
        """One pass; with lengths, of sequences that end at the last slot."""
        positions_B_T = (torch.tensor(first)[:, None] + torch.arange(ids_B_T.shape[1])).clamp(min=0)
        mask_B_S = None
        if lengths is not None and len(set(lengths)) > 1:  # else nothing is padded
            mask_B_S = self.send(attention_mask(lengths))
        token_ids_B_T = self.send(ids_B_T)
        last_hidden_B_T_D, cr_B_T_D = self.forward(
            token_ids_B_T, self.send(positions_B_T), cache=cache, mask_B_S=mask_B_S
        )
        # The last layer may be on another device than the first.
        return ForwardPass(last_hidden_B_T_D.to(self.device), cr_B_T_D.to(self.device), token_ids_B_T, first)

    def forward(
        self,
        ids_B_T: Tensor,
        positions_B_T: Tensor,
        *,
        cache: AlignedCache | None = None,
        mask_B_S: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One pass of the model without its head: the head's input and the CRs, both [B, T, D]."""
        inputs: dict[str, Any] = {"input_ids": ids_B_T, "use_cache": cache is not None, "past_key_values": cache}
        if mask_B_S is not None:
            inputs["attention_mask"] = mask_B_S
        # OPT and GPT-2 count positions themselves unless told; where padding lies inside the cache they must be told.
        if "position_ids" in self._accepts:
            inputs["position_ids"] = positions_B_T
        captured: list[Tensor] = []
        if self._ffn is None:
            last_hidden_B_T_D = self._base(**inputs).last_hidden_state
            return last_hidden_B_T_D, last_hidden_B_T_D
        handle = self._ffn.register_forward_hook(lambda module, args, output: captured.append(_first(output)))
        try:
            last_hidden_B_T_D = self._base(**inputs).last_hidden_state
        finally:
            handle.remove()
        # OPT flattens batch and positions before its feed-forward layer.
        return last_hidden_B_T_D, captured[-1].view(*ids_B_T.shape, -1)


def attention_mask(lengths: Sequence[int]) -> Tensor:
    """1 for the tokens of sequences that end at the last slot, 0 for the padding before: int64 [B, S], on the host."""
    slots = max(lengths)
    return (torch.arange(slots) >= slots - torch.tensor(lengths)[:, None]).long()


def _tokens(states: Sequence[Tensor]) -> int:
    return sum(map(len, states))


def _first(output: Any) -> Tensor:
    # Mixture-of-experts blocks return (hidden states, router logits).
    result = output[0] if isinstance(output, tuple) else output
    if not isinstance(result, Tensor):
        raise ServerFault("The model's feed-forward layer gives no tensor.", hint="Serve last_hidden_state instead.")
    return result


def _last_ffn(base: nn.Module) -> nn.Module:
    """The feed-forward module of the last block: its output is what the block adds to its residual stream.

    In Gemma 2 and 3 a further norm stands between; the output here is the feed-forward layer's own.
    """
    stacks = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    # The longest stack is that of the blocks, unless it holds the experts of one of them.
    for stack in sorted(stacks, key=len, reverse=True):
        for name in _FFN_NAMES:
            module = getattr(stack[-1], name, None)
            if isinstance(module, nn.Module):
                return module
    raise Unsupported(
        f"No feed-forward layer was found in the last block of {type(base).__name__}.",
        hint="Serve --cr-kind last_hidden_state, which every model has.",
    )

"""Forward passes of a causal language model without its head, with padding, shared prefixes and cached states."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plm_owner_server.engines.batching import common_prefix, plan_batches, shared_prefixes
from plm_owner_server.engines.interface import EngineStats
from plm_owner_server.engines.transformers.attention import mask_without_waiting, padding_mask
from plm_owner_server.engines.transformers.kv_cache import AlignedCache, KvLayout, PassingCache
from plm_owner_server.engines.transformers.prefix_cache import PrefixCache
from protocol.errors import ServerFault, Unsupported

# Tokens that an extra pass must save: about the cost of a pass.
MIN_SAVED_TOKENS = 64
_FFN_NAMES = ("mlp", "feed_forward", "feedforward", "ffn", "block_sparse_moe", "moe", "fc2")


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """Results of one forward pass.

    Attributes:
        last_hidden_B_T_D: the head's input.
        cr_B_T_D: context representations.
        token_ids_B_T: tokens that were run, padding included.
        first_position: position of each sequence's column 0; negative if the row begins with padding.
    """

    last_hidden_B_T_D: Tensor
    cr_B_T_D: Tensor
    token_ids_B_T: Tensor
    first_position: list[int]

    def flat_positions(self, row: int, start: int, stop: int) -> range:
        """Indices in the flattened B · T of the positions [start, stop) of the sequence in a row."""
        origin = row * self.token_ids_B_T.shape[1] - self.first_position[row]
        return range(origin + start, origin + stop)


class ModelRunner:
    """Runs the body of a model.

    Args:
        model: the model in evaluation mode, on its device.
        ffn_output: return the last block's feed-forward output as the representation.
        prefix_cache_bytes: bound on the cached attention states; 0 disables the cache.
        prefix_cache_ttl: seconds after their last use at which cached states are removed.

    Attributes:
        stats: statistics of what was run.

    Raises:
        Unsupported: no feed-forward layer was found in the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        ffn_output: bool,
        prefix_cache_bytes: int,
        prefix_cache_ttl: float = math.inf,
    ) -> None:
        mask_without_waiting(model)
        self._base = model.base_model
        self._accepts = set(inspect.signature(self._base.forward).parameters)
        self._ffn = _last_ffn(self._base) if ffn_output else None
        self._prefixes = PrefixCache(prefix_cache_bytes, prefix_cache_ttl) if prefix_cache_bytes else None
        self._layout: KvLayout | None = None  # of the first states that were stored
        self.stats = EngineStats()

    @property
    def device(self) -> torch.device:
        """Device of the model's input."""
        return self._base.get_input_embeddings().weight.device  # type: ignore[no-any-return]

    def to_device(self, host: Tensor) -> Tensor:
        """Copy a tensor from the host to the device, without waiting for the device."""
        if self.device.type != "cuda":
            return host.to(self.device)
        # A copy from unpinned memory waits for the device.
        return host.pin_memory().to(self.device, non_blocking=True)

    def shared_states(self, tenant: str, token_ids: Sequence[Sequence[int]], *, at_most: int) -> list[Tensor]:
        """Cached states [T_i, F] of the prefix common to all sequences.

        If that saves more than it costs, states that are not cached are computed once for all sequences.
        """
        if self._prefixes is None:
            return []
        shared = min(common_prefix(token_ids), min(map(len, token_ids)) - 1, at_most)
        prefix = list(token_ids[0][:shared])
        states = self._prefixes.match(tenant, prefix)
        if (shared - _token_count(states)) * (len(token_ids) - 1) >= MIN_SAVED_TOKENS:
            (states,) = self._compute(tenant, [prefix], [states])
        return states

    def _compute(
        self, tenant: str, prefixes: Sequence[list[int]], cached: Sequence[list[Tensor]]
    ) -> list[list[Tensor]]:
        """Compute and store all states of some prefixes in one pass. `cached` holds the states that exist already."""
        _, cache = self.prefill(prefixes, cached)
        states = []
        for row, (prefix, pieces) in enumerate(zip(prefixes, cached, strict=True)):
            missing = len(prefix) - _token_count(pieces)
            self.store(tenant, prefix, cache, row, len(prefix) - missing)
            # Not from the prefix cache, which may have had no room.
            states.append([*pieces, cache.states(row, -missing, 0)])
        return states

    def cached_states(
        self, tenant: str, token_ids: Sequence[Sequence[int]], from_position: Sequence[int], batch_tokens: int
    ) -> tuple[list[list[Tensor]], int]:
        """States of each sequence's longest cached prefix before `from_position`.

        A prefix that all sequences share, or that some share (as draws from one prompt and labels behind one text do),
        is computed once and cached, if that saves more than it costs.

        Args:
            tenant: the tenant that asks.
            token_ids: token ids of each sequence.
            from_position: first requested position of each sequence.
            batch_tokens: largest number of tokens in one pass, padding included.

        Returns:
            The states of each sequence, in pieces [T_i, F]; and the number of tokens that were run for prefixes that
            several sequences share, padding included.
        """
        if self._prefixes is None:
            return [[] for _ in token_ids], 0
        shared = self.shared_states(tenant, token_ids, at_most=min(from_position))
        before = [list(ids[:at]) for ids, at in zip(token_ids, from_position, strict=True)]
        cached = [max(self._prefixes.match(tenant, ids), shared, key=_token_count) for ids in before]
        prefixes = shared_prefixes(before, [_token_count(states) for states in cached], MIN_SAVED_TOKENS)
        missing = [length - _token_count(cached[first]) for length, (first, *_) in prefixes]
        plan = plan_batches(missing, batch_tokens, MIN_SAVED_TOKENS)
        for batch in plan:
            firsts = [(prefixes[i][0], prefixes[i][1][0]) for i in batch]
            computed = self._compute(
                tenant, [before[first][:length] for length, first in firsts], [cached[first] for _, first in firsts]
            )
            for i, states in zip(batch, computed, strict=True):
                for index in prefixes[i][1]:
                    cached[index] = states
        return cached, sum(len(batch) * max(missing[i] for i in batch) for batch in plan)

    def store(self, tenant: str, token_ids: Sequence[int], cache: AlignedCache, row: int, cached_tokens: int) -> None:
        """Store the states of a sequence in the prefix cache, so that a later call can continue it.

        Args:
            tenant: the tenant that the sequence belongs to.
            token_ids: token ids of all its states, cached and new.
            cache: the cache with its new states.
            row: its row in `cache`.
            cached_tokens: number of its first tokens whose states were cached before.
        """
        if self._prefixes is None or cached_tokens >= len(token_ids):
            return
        if self._layout is None:
            self._layout = KvLayout.from_cache(cache)
        self._prefixes.insert(tenant, token_ids, cache.states(row, cached_tokens - len(token_ids), 0))
        self.stats.cached_bytes = self._prefixes.size_bytes

    def evict_idle(self) -> None:
        """Remove cached states that were not used for `prefix_cache_ttl` seconds."""
        if self._prefixes is not None:
            self._prefixes.evict_idle()
            self.stats.cached_bytes = self._prefixes.size_bytes

    def reset(self) -> None:
        """Remove all cached states, and start the statistics again."""
        if self._prefixes is not None:
            self._prefixes.clear()
        self.stats.reset()

    def load(self, cached: Sequence[Sequence[Tensor]], lengths: Sequence[int]) -> AlignedCache:
        """A cache with the first `lengths[i]` cached states of sequence i."""
        if self._layout is None or not any(lengths):
            return AlignedCache()
        self.stats.cached_tokens += sum(lengths)
        return self._layout.unpack(cached, lengths)

    def encode(self, token_ids: Sequence[Sequence[int]], shared: Sequence[Tensor]) -> ForwardPass:
        """Run sequences that all begin with the cached states `shared`, padded on the right.

        No mask is needed: with causal attention no position attends to the padding on its right.
        """
        reused = _token_count(shared)
        cache = self.load([shared] * len(token_ids), [reused] * len(token_ids)) if reused else None
        ids_B_T = nn.utils.rnn.pad_sequence([torch.tensor(ids[reused:]) for ids in token_ids], batch_first=True)
        self.stats.record("encode", sum(len(ids) - reused for ids in token_ids), ids_B_T.numel())
        return self._pass(ids_B_T, [reused] * len(token_ids), cache)

    def prefill(
        self, token_ids: Sequence[Sequence[int]], cached: Sequence[Sequence[Tensor]]
    ) -> tuple[ForwardPass, AlignedCache]:
        """Run sequences up to their last token, padded on the left. Return a cache with all states to draft from.

        Every sequence runs equally many tokens. One that needs fewer runs cached ones again, which costs as much as
        padding.
        """
        lengths = [len(ids) for ids in token_ids]
        steps = max(length - _token_count(states) for length, states in zip(lengths, cached, strict=True))
        reused = [max(0, length - steps) for length in lengths]
        cache = self.load(cached, reused)
        ids_B_T = nn.utils.rnn.pad_sequence(
            [torch.tensor(ids[-steps:]) for ids in token_ids], batch_first=True, padding_side="left"
        )
        self.stats.record("prompt", sum(min(length, steps) for length in lengths), ids_B_T.numel())
        return self._pass(ids_B_T, [length - steps for length in lengths], cache, lengths), cache

    def step(self, token_ids: Sequence[int], lengths: Sequence[int], cache: AlignedCache) -> ForwardPass:
        """Run one more token of every sequence in the cache.

        Args:
            token_ids: the token of each sequence.
            lengths: length of each sequence, that token included.
            cache: states of the sequences; the new states are appended.
        """
        self.stats.record("step", len(token_ids), len(token_ids))
        return self._pass(torch.tensor(token_ids)[:, None], [length - 1 for length in lengths], cache, lengths)

    def _pass(
        self,
        ids_B_T: Tensor,
        first_position: list[int],
        cache: AlignedCache | None,
        lengths: Sequence[int] | None = None,
    ) -> ForwardPass:
        """Run one pass. Lengths are those of sequences that end at the last slot; None if they begin at the first."""
        positions_B_T = (torch.tensor(first_position)[:, None] + torch.arange(ids_B_T.shape[1])).clamp(min=0)
        mask_B_S = None
        if lengths is not None and len(set(lengths)) > 1:  # equal lengths have no padding
            mask_B_S = self.to_device(padding_mask(lengths))
        token_ids_B_T = self.to_device(ids_B_T)
        last_hidden_B_T_D, cr_B_T_D = self.forward(
            token_ids_B_T, self.to_device(positions_B_T), cache=cache, mask_B_S=mask_B_S
        )
        # The last layer may be on another device than the first.
        return ForwardPass(last_hidden_B_T_D.to(self.device), cr_B_T_D.to(self.device), token_ids_B_T, first_position)

    def forward(
        self,
        ids_B_T: Tensor,
        positions_B_T: Tensor,
        *,
        cache: AlignedCache | None = None,
        mask_B_S: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the model without its head. Return the head's input and the CRs, both [B, T, D]."""
        inputs: dict[str, Any] = {"input_ids": ids_B_T, "use_cache": cache is not None}
        inputs["past_key_values"] = PassingCache() if cache is None else cache
        if mask_B_S is not None:
            inputs["attention_mask"] = mask_B_S
        # OPT and GPT-2 count positions themselves if they get none, which is wrong with padding inside the cache.
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


def _token_count(states: Sequence[Tensor]) -> int:
    return sum(map(len, states))


def _first(output: Any) -> Tensor:
    # Mixture-of-experts blocks return (hidden states, router logits).
    result = output[0] if isinstance(output, tuple) else output
    if not isinstance(result, Tensor):
        raise ServerFault("The model's feed-forward layer returns no tensor.", hint="Serve last_hidden_state instead.")
    return result


def _last_ffn(base: nn.Module) -> nn.Module:
    """The feed-forward module of the last block, whose output the block adds to its residual stream.

    In Gemma 2 and 3 a further norm stands between; the output here is that before the norm.
    """
    stacks = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    # The longest stack is that of the blocks, unless it holds the experts of one block.
    for stack in sorted(stacks, key=len, reverse=True):
        for name in _FFN_NAMES:
            module = getattr(stack[-1], name, None)
            if isinstance(module, nn.Module):
                return module
    raise Unsupported(
        f"No feed-forward layer was found in the last block of {type(base).__name__}.",
        hint="Serve --cr-kind last_hidden_state, which every model has.",
    )

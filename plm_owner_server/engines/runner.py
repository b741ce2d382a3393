"""From token ids to hidden states: forward passes of a causal language model without its head.

Padding, shared prefixes and known states are dealt with here, so that nobody else has to.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from plm_owner_server.batching import common_prefix
from plm_owner_server.engines.kv_rows import KvLayout, pack, pad
from plm_owner_server.engines.prefix_cache import PrefixCache
from protocol.checks import echo
from protocol.errors import ServerFault, Unsupported

# Tokens that a pass of its own for a shared prefix must save: about what a pass costs.
_WORTH_A_PASS = 64
_FFN_NAMES = ("mlp", "feed_forward", "feedforward", "ffn", "block_sparse_moe", "moe", "fc2")


@dataclass
class Prefilled:
    """State after the prompts.

    The cache has a slot for every reused state (those of each sequence padded to the most), then for each of the T
    positions run (padded likewise), then for what is drafted.

    Attributes:
        token_ids_B_T: what was run: each sequence after its reused tokens.
        reused: tokens of each sequence that were not run, as their states were known.
        lengths: tokens of each sequence that were run.
    """

    last_hidden_B_T_D: Tensor
    cr_B_T_D: Tensor
    token_ids_B_T: Tensor
    reused: list[int]
    lengths: list[int]
    cache: DynamicCache | None

    @property
    def reused_slots(self) -> int:
        return max(self.reused)

    @property
    def is_padded(self) -> bool:
        """Whether there is padding anywhere."""
        return len(set(zip(self.reused, self.lengths, strict=True))) > 1

    def places(self, from_position: Sequence[int]) -> list[int]:
        """Where in the flattened B · T the positions ≥ `from_position` are, sequence by sequence."""
        steps = self.token_ids_B_T.shape[1]
        starts = [start - known for start, known in zip(from_position, self.reused, strict=True)]
        return [
            row * steps + step
            for row, (start, length) in enumerate(zip(starts, self.lengths, strict=True))
            for step in range(start, length)
        ]

    def echo(self, token_ids: Sequence[Sequence[int]], ran_B_T: Tensor) -> list[int]:
        """Echo of what was run: the known prefix, then each sequence's row of `token_ids_B_T`, now on the host."""
        return [
            echo([*ids[:known], *row[:length]])
            for ids, row, length, known in zip(token_ids, ran_B_T.tolist(), self.lengths, self.reused, strict=True)
        ]


class Runner:
    """Runs the body of a model.

    Args:
        model: in evaluation mode, on its device.
        ffn_output: also give the last block's feed-forward output as the representation.
        prefix_cache_bytes: bound on the attention states kept for texts that begin alike or go on; 0 keeps none.

    Attributes:
        window: tokens that the narrowest attention layer sees; None if all layers see everything.

    Raises:
        Unsupported: the model has no feed-forward layer that could be found.
    """

    def __init__(self, model: PreTrainedModel, *, ffn_output: bool, prefix_cache_bytes: int) -> None:
        self._config = model.config
        self._base = model.base_model
        self._accepts = set(inspect.signature(self._base.forward).parameters)
        self._ffn = _last_ffn(self._base) if ffn_output else None
        self._prefixes = PrefixCache(prefix_cache_bytes) if prefix_cache_bytes else None
        self._layout: KvLayout | None = None  # known after the first pass with a cache
        self.window = _attention_window(model.config.get_text_config())

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

    @property
    def keeps_states(self) -> bool:
        """Whether states outlive a batch."""
        return self._prefixes is not None

    def shared_states(self, token_ids: Sequence[Sequence[int]], *, at_most: int) -> list[Tensor]:
        """States [T_i, F] of what all sequences begin with; computed once for all, if that saves more than it costs."""
        if self._prefixes is None:
            return []
        shared = min(common_prefix(token_ids), min(map(len, token_ids)) - 1, at_most)
        if self.window is not None:
            # Layers with a window forget their first states once it is full.
            shared = min(shared, self.window - 1)
        prefix = list(token_ids[0][:shared])
        states = self._prefixes.match(prefix)
        missing = shared - sum(map(len, states))
        if missing * (len(token_ids) - 1) > _WORTH_A_PASS:
            state = self.prefill([prefix], [states], keep_cache=True)
            states = [*states, self._packed(state, [0])[0]]
            self._prefixes.insert(prefix, states[-1])
        return states

    def known_states(
        self, token_ids: Sequence[Sequence[int]], from_position: Sequence[int], drafted: int
    ) -> list[list[Tensor]]:
        """States of each sequence's longest known prefix before `from_position`."""
        shared = self.shared_states(token_ids, at_most=min(from_position))
        if self._prefixes is None:
            return [shared] * len(token_ids)
        known = [self._prefixes.match(ids[:start]) for ids, start in zip(token_ids, from_position, strict=True)]
        reused = [sum(map(len, states)) for states in known]
        to_run = max(len(ids) - count for ids, count in zip(token_ids, reused, strict=True))
        window = self.window
        # Reused states of unequal number are padded, and padding inside a window would push real tokens out of it.
        if len(set(reused)) > 1 and window is not None and max(reused) + to_run + drafted > window:
            return [shared] * len(token_ids)
        return known

    def keep(
        self,
        state: Prefilled,
        token_ids: Sequence[Sequence[int]],
        drafts: Sequence[Sequence[int]],
        leaving: Sequence[tuple[int, int]],
    ) -> None:
        """Keep the states of sequences that leave the batch, drafts included: the next call may go on from there.

        Args:
            state: after the prompts, with the drafts in its cache.
            token_ids: the prompts.
            drafts: what was run after each of them.
            leaving: of each sequence that leaves, its row of the cache and its index among the prompts.
        """
        window = self.window
        if self._prefixes is None or state.cache is None:
            return
        if window is not None and state.cache.get_seq_length() >= window:
            return
        kv_R_S_F = self._packed(state, [row for row, _ in leaving])
        ran = state.token_ids_B_T.shape[1]
        for (_, owner), kv_S_F in zip(leaving, kv_R_S_F, strict=True):
            own_S_F = torch.cat([kv_S_F[: state.lengths[owner]], kv_S_F[ran : ran + len(drafts[owner])]])
            self._prefixes.insert([*token_ids[owner], *drafts[owner]], own_S_F)

    def _packed(self, state: Prefilled, rows: Sequence[int]) -> Tensor:
        """States [R, S, F] of some rows of the cache, from the first token that was run on."""
        if state.cache is None:
            raise ServerFault("The attention states were not kept.", hint="Report this to the owner.")
        if self._layout is None:
            self._layout = KvLayout.of(state.cache)
        return pack(state.cache, self.send(torch.tensor(rows)), state.reused_slots)

    def prefill(
        self, token_ids: Sequence[Sequence[int]], known: Sequence[Sequence[Tensor]], *, keep_cache: bool
    ) -> Prefilled:
        """Run the prompts from their known states on, padded on the right.

        Where no states are padded there is no need of a mask: with causal attention no position sees what stands to its
        right.
        """
        reused = [sum(map(len, states)) for states in known]
        cache = DynamicCache(config=self._config) if keep_cache else None
        if any(reused) and self._layout is not None:
            cache = self._layout.unpack(pad(known), self._config)
        lengths = [len(ids) - count for ids, count in zip(token_ids, reused, strict=True)]
        padded_B_T = nn.utils.rnn.pad_sequence(
            [torch.tensor(ids[count:], dtype=torch.long) for ids, count in zip(token_ids, reused, strict=True)],
            batch_first=True,
        )
        steps = padded_B_T.shape[1]
        positions_B_T = torch.tensor(reused)[:, None] + torch.arange(steps)
        mask_B_T = None
        if len(set(reused)) > 1:
            # Padding stands still at the last position: there may be none beyond it. Elsewhere it must not, or
            # transformers takes it for packed sequences and builds a mask of its own.
            positions_B_T = positions_B_T.minimum(torch.tensor(list(map(len, token_ids)))[:, None] - 1)
            mask_B_T = self.send(attention_mask(reused, lengths, steps))
        token_ids_B_T = self.send(padded_B_T)
        last_hidden_B_T_D, cr_B_T_D = self.forward(
            token_ids_B_T, self.send(positions_B_T), cache=cache, mask_B_T=mask_B_T
        )
        return Prefilled(last_hidden_B_T_D, cr_B_T_D, token_ids_B_T, reused, lengths, cache)

    def forward(
        self,
        ids_B_T: Tensor,
        positions_B_T: Tensor,
        *,
        cache: DynamicCache | None = None,
        mask_B_T: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One pass of the model without its head: the head's input and the CRs, both [B, T, D]."""
        inputs: dict[str, Any] = {"input_ids": ids_B_T, "use_cache": cache is not None, "past_key_values": cache}
        if mask_B_T is not None:
            inputs["attention_mask"] = mask_B_T
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


def attention_mask(reused: Sequence[int], lengths: Sequence[int], steps: int) -> Tensor:
    """1 for reused and run tokens, 0 for the padding after each: int64 [B, slots], on the host."""
    parts = [(reused, max(reused)), (lengths, steps)]
    return torch.cat([torch.arange(size) < torch.tensor(counts)[:, None] for counts, size in parts], dim=1).long()


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


def _attention_window(config: Any) -> int | None:
    """Tokens that the narrowest attention layer sees; None if all layers see everything."""
    windows = [getattr(config, "attention_chunk_size", None)]
    if getattr(config, "use_sliding_window", True):
        windows.append(getattr(config, "sliding_window", None))
    return min((window for window in windows if window), default=None)

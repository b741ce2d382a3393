"""The engine over Hugging Face transformers, for any decoder-only `AutoModelForCausalLM`.

No list of architectures: the last hidden state is what the model's own base returns, the head is what the model
declares as its output embedding, and `warm_up` proves both against the model's own logits before anything is served.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

from plm_owner_server.batching import common_prefix
from plm_owner_server.engines.base import Decoded, Encoded, EngineInfo
from plm_owner_server.engines.kv_rows import KvLayout, pack, pad
from plm_owner_server.engines.prefix_cache import PrefixCache
from protocol.checks import echo
from protocol.errors import ServerFault, Unsupported
from protocol.head import LMHead
from protocol.messages import CrKind

log = logging.getLogger(__name__)

# Rows × V float32 logits that exist at once: 256 MiB.
_LOGITS_AT_ONCE = 2**26
# On a CPU, rows × tokens of the vocabulary at once: what stays in its cache between product and reduction. Twice as
# fast as all logits of 32 rows (V 262,144) at once.
_CPU_BLOCK = (512, 2048)
# Tokens that a pass of its own for a shared prefix must save: about what a pass costs.
_WORTH_A_PASS = 64
_FFN_NAMES = ("mlp", "feed_forward", "feedforward", "ffn", "block_sparse_moe", "moe", "fc2")


def load_model(folder: Path, *, device: str, dtype: str) -> PreTrainedModel:
    """Load a causal language model; `auto` means CUDA with bfloat16 where there is CUDA, else the CPU with float32.

    Raises:
        Unsupported: transformers cannot load it as one.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    except (ValueError, OSError, KeyError) as error:
        raise Unsupported(
            f"transformers cannot load {folder} as a causal language model: {error}",
            hint="It must hold config.json and weights of an AutoModelForCausalLM architecture.",
        ) from error
    return model.to(device).eval()


@dataclass
class _Prefilled:
    """State after the prompts.

    The cache has a slot for every reused state (those of each sequence padded to the most), then for each of the T
    positions run (padded likewise), then for what is drafted.

    Attributes:
        token_ids_B_T: what was run: each sequence from its `reused_B`-th token on.
        reused_B: tokens of each sequence that were not run, as their states were known.
        lengths_B: tokens of each sequence that were run.
    """

    last_hidden_B_T_D: Tensor
    cr_B_T_D: Tensor
    token_ids_B_T: Tensor
    reused_B: Tensor
    lengths_B: Tensor
    cache: DynamicCache | None

    @property
    def reused_slots(self) -> int:
        return int(self.reused_B.max())


class TransformersEngine:
    """Runs a causal language model with transformers.

    Args:
        model: in evaluation mode, on its device.
        cr_kind: which representation `encode` and `decode` give.
        prefix_cache_bytes: bound on the attention states kept for texts that begin alike or go on; 0 keeps none, and
            computes every token of every sequence.

    Raises:
        Unsupported: the model is no attention-based decoder, or has no such representation.
    """

    def __init__(self, model: PreTrainedModel, *, cr_kind: CrKind, prefix_cache_bytes: int = 2**28) -> None:
        config = model.config.get_text_config()
        output = model.get_output_embeddings()
        if model.config.is_encoder_decoder or not isinstance(output, nn.Linear):
            raise Unsupported(
                f"{type(model).__name__} has no linear LM head on a decoder.",
                hint="Serve a decoder-only language model.",
            )
        if getattr(model, "_is_stateful", False):
            raise Unsupported(
                f"{type(model).__name__} carries a recurrent state, which padding would spoil.",
                hint="Serve an attention-based model.",
            )
        self._model = model
        self._base = model.base_model
        self._accepts = set(inspect.signature(self._base.forward).parameters)
        self._prefixes = PrefixCache(prefix_cache_bytes) if prefix_cache_bytes else None
        self._layout: KvLayout | None = None  # known after the first pass with a cache
        self._ffn = _last_ffn(self._base) if cr_kind == "ffn_output" else None
        self.head = LMHead(
            output.weight.detach(),
            None if output.bias is None else output.bias.detach(),
            _logit_scale(config),
            getattr(config, "final_logit_softcapping", None),
        )
        self.info = EngineInfo(
            hidden_size=self.head.weight_V_D.shape[1],
            vocab_size=self.head.weight_V_D.shape[0],
            max_tokens=getattr(config, "max_position_embeddings", None),
            dtype=str(model.dtype).removeprefix("torch."),
            cr_kind=cr_kind,
            attention_window=_attention_window(config),
            eos_token_ids=_eos(model),
        )

    @property
    def _device(self) -> torch.device:
        return self.head.weight_V_D.device

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Check on a real forward pass that softmax(head(f)) is the model's own distribution.

        Raises:
            Unsupported: something between the last hidden state and the logits is not known here, or the
                representation is not of the head's width.
        """
        ids_B_T = torch.arange(1, 9, device=self._device).remainder(self.info.vocab_size)[None]
        expected = self._model(input_ids=ids_B_T, use_cache=False).logits.float()
        state = self._prefill([ids_B_T[0].tolist()], [[]], keep_cache=False)
        ours = self.head.logits(state.last_hidden_B_T_D).float()
        error = ((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
        tolerance = 1e-4 if self._model.dtype == torch.float32 else 3e-2
        if not error <= tolerance:
            raise Unsupported(
                f"The logits of {type(self._model).__name__} are not head(last hidden state): relative difference "
                f"{error:.1e}.",
                hint="This architecture changes the logits in a way that is not known here; please report it.",
            )
        if state.cr_B_T_D.shape != state.last_hidden_B_T_D.shape:
            raise Unsupported(
                f"The feed-forward output of {type(self._model).__name__} is {state.cr_B_T_D.shape[-1]} wide, its head "
                f"takes {self.info.hidden_size}.",
                hint="An adapter could not map one to the other; serve --cr-kind last_hidden_state.",
            )
        log.info("warm-up: logits agree with the model's own to %.1e", error)

    @torch.inference_mode()
    def encode(
        self, token_ids: Sequence[Sequence[int]], from_position: Sequence[int], *, with_logsumexp: bool
    ) -> Encoded:
        """Representations of all positions ≥ `from_position` of every sequence, from one forward pass."""
        shared = self._shared_states(token_ids, at_most=min(from_position))
        state = self._prefill(token_ids, [shared] * len(token_ids), keep_cache=False)
        rows = [len(ids) - start for ids, start in zip(token_ids, from_position, strict=True)]
        starts_B = torch.tensor(from_position, device=self._device) - state.reused_B
        steps = state.token_ids_B_T.shape[1]
        wanted_B_T = _first_of(state.lengths_B, steps) & ~_first_of(starts_B, steps)
        last_hidden_N_D = state.last_hidden_B_T_D[wanted_B_T]
        logsumexp_N = self._logsumexp_top1(last_hidden_N_D)[0].cpu() if with_logsumexp else None
        return Encoded(
            rows=rows,
            echo=self._echo(state, token_ids),
            cr_N_D=state.cr_B_T_D[wanted_B_T].cpu(),
            last_hidden_N_D=last_hidden_N_D.cpu() if self._ffn is not None else None,
            logsumexp_N=logsumexp_N,
        )

    @torch.inference_mode()
    def decode(
        self, token_ids: Sequence[Sequence[int]], look_ahead: Sequence[int], stop_token_ids: frozenset[int]
    ) -> Decoded:
        """The newest position of every sequence, and up to `look_ahead` greedily drafted ones.

        A sequence's drafting ends after a stop token, which is its last top-1 then and is not run itself.
        """
        keep = self._prefixes is not None
        state = self._prefill(
            token_ids, self._known_states(token_ids, max(look_ahead)), keep_cache=keep or max(look_ahead) > 0
        )
        newest = (torch.arange(len(token_ids), device=self._device), state.lengths_B - 1)
        stop_S = torch.tensor(sorted(stop_token_ids), dtype=torch.long, device=self._device)
        mask_B_T = _attention_mask(state.reused_B, state.lengths_B, state.token_ids_B_T.shape[1])
        positions_B = state.reused_B + state.lengths_B
        left_B = torch.tensor(look_ahead, device=self._device)
        # B shrinks: sequences that have ended leave once they are half of the batch. A row's owner is its sequence.
        owner_B = torch.arange(len(token_ids), device=self._device)
        active_B = torch.ones_like(owner_B, dtype=torch.bool)
        last_hidden_B_D, cr_B_D = state.last_hidden_B_T_D[newest], state.cr_B_T_D[newest]
        steps: list[tuple[Tensor, ...]] = []
        drafts: list[list[int]] = [[] for _ in token_ids]
        while True:
            logsumexp_A, top1_A, top1_logit_A = self._logsumexp_top1(last_hidden_B_D[active_B])
            columns = (cr_B_D[active_B], last_hidden_B_D[active_B], logsumexp_A, top1_A, top1_logit_A - logsumexp_A)
            steps.append((owner_B[active_B], *columns))
            top1_B = torch.zeros_like(owner_B).masked_scatter(active_B, top1_A)
            active_B = active_B & (left_B > 0) & ~torch.isin(top1_B, stop_S)
            remaining = int(active_B.sum())
            if remaining == 0:
                break
            if state.cache is not None and 2 * remaining <= len(active_B):
                self._keep(state, token_ids, drafts, owner_B, ~active_B)
                state.cache.batch_select_indices(active_B.nonzero()[:, 0])
                rows = (mask_B_T, positions_B, left_B, owner_B, top1_B, active_B)
                mask_B_T, positions_B, left_B, owner_B, top1_B, active_B = (row[active_B] for row in rows)
            for owner, token in zip(owner_B[active_B].tolist(), top1_B[active_B].tolist(), strict=True):
                drafts[owner].append(token)
            mask_B_T = torch.cat([mask_B_T, torch.ones_like(mask_B_T[:, :1])], dim=1)
            # An ended row is carried along at any position that exists; its own may lie past the model's last.
            at_B = torch.where(active_B, positions_B, 0)
            last_hidden_B_1_D, cr_B_1_D = self._forward(
                top1_B[:, None], at_B[:, None], cache=state.cache, mask_B_T=mask_B_T
            )
            last_hidden_B_D, cr_B_D = last_hidden_B_1_D[:, 0], cr_B_1_D[:, 0]
            positions_B, left_B = positions_B + 1, left_B - 1
        self._keep(state, token_ids, drafts, owner_B, torch.ones_like(active_B))
        owner_N, *parts = (torch.cat(column) for column in zip(*steps, strict=True))
        # From step by step to sequence by sequence.
        order_N = owner_N.argsort(stable=True)
        cr_N_D, last_hidden_N_D, logsumexp_N, top1_N, top1_logprob_N = (part[order_N].cpu() for part in parts)
        return Decoded(
            rows=owner_N.bincount(minlength=len(token_ids)).tolist(),
            echo=self._echo(state, token_ids),
            cr_N_D=cr_N_D,
            last_hidden_N_D=last_hidden_N_D if self._ffn is not None else None,
            logsumexp_N=logsumexp_N,
            top1_N=top1_N,
            top1_logprob_N=top1_logprob_N,
        )

    def _shared_states(self, token_ids: Sequence[Sequence[int]], *, at_most: int) -> list[Tensor]:
        """States [T_i, F] of what all sequences begin with; computed once for all, if that saves more than it costs."""
        if self._prefixes is None:
            return []
        shared = min(common_prefix(token_ids), min(map(len, token_ids)) - 1, at_most)
        if self.info.attention_window is not None:
            # Layers with a window forget their first states once it is full.
            shared = min(shared, self.info.attention_window - 1)
        prefix = list(token_ids[0][:shared])
        states = self._prefixes.match(prefix)
        missing = shared - sum(map(len, states))
        if missing * (len(token_ids) - 1) > _WORTH_A_PASS:
            state = self._prefill([prefix], [states], keep_cache=True)
            states = [*states, self._packed(state, torch.tensor([0], device=self._device))[0]]
            self._prefixes.insert(prefix, states[-1])
        return states

    def _known_states(self, token_ids: Sequence[Sequence[int]], drafted: int) -> list[list[Tensor]]:
        """States of each sequence's longest known prefix, its last token excluded."""
        shared = self._shared_states(token_ids, at_most=min(map(len, token_ids)) - 1)
        if self._prefixes is None:
            return [shared] * len(token_ids)
        known = [self._prefixes.match(ids[:-1]) for ids in token_ids]
        reused = [sum(map(len, states)) for states in known]
        to_run = max(len(ids) - count for ids, count in zip(token_ids, reused, strict=True))
        window = self.info.attention_window
        # Reused states of unequal number are padded, and padding inside a window would push real tokens out of it.
        if len(set(reused)) > 1 and window is not None and max(reused) + to_run + drafted > window:
            return [shared] * len(token_ids)
        return known

    def _keep(
        self,
        state: _Prefilled,
        token_ids: Sequence[Sequence[int]],
        drafts: Sequence[Sequence[int]],
        owner_B: Tensor,
        leaving_B: Tensor,
    ) -> None:
        """Keep the states of sequences that leave the batch, drafts included: the next call may go on from there."""
        window = self.info.attention_window
        if self._prefixes is None or state.cache is None:
            return
        if window is not None and state.cache.get_seq_length() >= window:
            return
        kv_R_S_F = self._packed(state, leaving_B.nonzero()[:, 0])
        ran = state.token_ids_B_T.shape[1]
        lengths = state.lengths_B.tolist()
        for owner, kv_S_F in zip(owner_B[leaving_B].tolist(), kv_R_S_F, strict=True):
            own_S_F = torch.cat([kv_S_F[: lengths[owner]], kv_S_F[ran : ran + len(drafts[owner])]])
            self._prefixes.insert([*token_ids[owner], *drafts[owner]], own_S_F)

    def _packed(self, state: _Prefilled, rows_R: Tensor) -> Tensor:
        """States [R, S, F] of some rows of the cache, from the first token that was run on."""
        if state.cache is None:
            raise ServerFault("The attention states were not kept.", hint="Report this to the owner.")
        if self._layout is None:
            self._layout = KvLayout.of(state.cache)
        return pack(state.cache, rows_R, state.reused_slots)

    def _prefill(
        self, token_ids: Sequence[Sequence[int]], known: Sequence[Sequence[Tensor]], *, keep_cache: bool
    ) -> _Prefilled:
        """Run the prompts from their known states on, padded on the right.

        Where no states are padded there is no need of a mask: with causal attention no position sees what stands to its
        right.
        """
        reused = [sum(map(len, states)) for states in known]
        cache = DynamicCache(config=self._model.config) if keep_cache else None
        if any(reused) and self._layout is not None:
            cache = self._layout.unpack(pad(known), self._model.config)
        padded_B_T = nn.utils.rnn.pad_sequence(
            [torch.tensor(ids[count:], dtype=torch.long) for ids, count in zip(token_ids, reused, strict=True)],
            batch_first=True,
        ).to(self._device)
        reused_B = torch.tensor(reused, device=self._device)
        lengths_B = torch.tensor(list(map(len, token_ids)), device=self._device) - reused_B
        # Padding stands still at the last position: there may be none beyond it.
        steps_B_T = torch.arange(padded_B_T.shape[1], device=self._device).minimum(lengths_B[:, None] - 1)
        mask_B_T = _attention_mask(reused_B, lengths_B, padded_B_T.shape[1]) if len(set(reused)) > 1 else None
        last_hidden_B_T_D, cr_B_T_D = self._forward(
            padded_B_T, reused_B[:, None] + steps_B_T, cache=cache, mask_B_T=mask_B_T
        )
        return _Prefilled(last_hidden_B_T_D, cr_B_T_D, padded_B_T, reused_B, lengths_B, cache)

    def _forward(
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

    def _logsumexp_top1(self, last_hidden_N_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log-sum-exp over V (float32), top-1 token and its logit; of N×V logits only a block exists at a time."""
        rows, columns = (
            _CPU_BLOCK if self._device.type == "cpu" else (_LOGITS_AT_ONCE // self.info.vocab_size + 1, None)
        )
        parts = [self._logsumexp_top1_block(block_C_D, columns) for block_C_D in last_hidden_N_D.split(rows)]
        logsumexp_N, top1_N, top1_logit_N = (torch.cat(column) for column in zip(*parts, strict=True))
        return logsumexp_N, top1_N, top1_logit_N

    def _logsumexp_top1_block(self, last_hidden_C_D: Tensor, columns: int | None) -> tuple[Tensor, Tensor, Tensor]:
        vocab_size = self.info.vocab_size
        step = columns or vocab_size
        blocks = []
        for start in range(0, vocab_size, step):
            logits_C_K = self.head.rows(slice(start, start + step)).logits(last_hidden_C_D).float()
            top_logit_C, top_C = logits_C_K.max(dim=-1)
            mass_C = logits_C_K.sub_(top_logit_C[:, None]).exp_().sum(dim=-1)  # relative to the block's top
            blocks.append((top_logit_C, top_C + start, mass_C))
        top_logit_C_M, top_C_M, mass_C_M = (torch.stack(column, dim=-1) for column in zip(*blocks, strict=True))
        top1_logit_C, at_C = top_logit_C_M.max(dim=-1)
        total_C = ((top_logit_C_M - top1_logit_C[:, None]).exp() * mass_C_M).sum(dim=-1)
        return top1_logit_C + total_C.log(), top_C_M.gather(-1, at_C[:, None])[:, 0], top1_logit_C

    def _echo(self, state: _Prefilled, token_ids: Sequence[Sequence[int]]) -> list[int]:
        """Echo of what was run: the known prefix, then each sequence's row of the padded batch."""
        rows, lengths, reused = state.token_ids_B_T.tolist(), state.lengths_B.tolist(), state.reused_B.tolist()
        return [
            echo([*ids[:known], *row[:length]])
            for ids, row, length, known in zip(token_ids, rows, lengths, reused, strict=True)
        ]


def _attention_mask(reused_B: Tensor, lengths_B: Tensor, steps: int) -> Tensor:
    """1 for reused and run tokens, 0 for the padding after each: [B, slots]."""
    return torch.cat([_first_of(reused_B, int(reused_B.max())), _first_of(lengths_B, steps)], dim=1).long()


def _first_of(counts_B: Tensor, size: int) -> Tensor:
    """Boolean [B, size]: the first `counts_B` of each row."""
    return torch.arange(size, device=counts_B.device) < counts_B[:, None]


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


def _logit_scale(config: Any) -> float:
    """Factor between the head's product and the logits: Cohere multiplies, Granite divides, Falcon-H1 multiplies."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    return scale / float(getattr(config, "logits_scaling", None) or 1.0)


def _eos(model: PreTrainedModel) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    if eos is None:
        eos = getattr(model.config.get_text_config(), "eos_token_id", None)
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),)

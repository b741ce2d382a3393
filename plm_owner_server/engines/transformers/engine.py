"""The engine over Hugging Face transformers, for any decoder-only `AutoModelForCausalLM`.

There is no list of architectures. The last hidden state is the output of the model's base, and the head is the output
embedding that the model declares. `warm_up` checks both against the model's own logits before anything is served.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from plm_owner_server.engines.interface import EncodeBatch, Encoded, EngineInfo
from plm_owner_server.engines.model_files.config import (
    ATTENTION_HINT,
    CAUSAL_LM_HINT,
    device_and_dtype,
    eos_token_ids,
    head_from_config,
    linear_head,
    load_config,
    require_device,
    unloadable,
)
from plm_owner_server.engines.ops.packed_linear import pack_linear_layers
from plm_owner_server.engines.ops.to_host import to_host
from plm_owner_server.engines.ops.vocab_reduction import VocabReduction
from plm_owner_server.engines.transformers.drafting import BatchedDrafting
from plm_owner_server.engines.transformers.model_runner import ModelRunner
from protocol.errors import Unsupported
from protocol.integrity import token_crc32
from protocol.types import CrKind

log = logging.getLogger(__name__)

# Kinds of layers, in a configuration's `layer_types`, that keep the keys and values of each position.
_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


def load_model(folder: Path, *, device: str, dtype: str, device_map: str | None = None) -> PreTrainedModel:
    """Load a causal language model.

    Args:
        folder: model folder in the Hugging Face layout.
        device: device of the whole model, unless there is a `device_map`; may be `auto`.
        dtype: dtype of the weights; may be `auto`.
        device_map: distribution of the layers over devices, as accelerate takes it; None for one device.

    Raises:
        InvalidRequest: there is no such device.
        Unsupported: transformers cannot load the folder as a causal language model, the checkpoint has not all of its
            tensors, or not all layers are attention.
    """
    device, dtype = device_and_dtype(device, dtype, has_gpu=torch.cuda.is_available())
    if device_map is None:
        require_device(device)
    try:
        _require_attention(load_config(folder))
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            device_map=device_map,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (Unsupported, torch.OutOfMemoryError):
        raise
    except Exception as error:  # every architecture and quantisation has errors of its own
        raise unloadable(folder, "causal language model", error, CAUSAL_LM_HINT) from error
    if missing := sorted(report["missing_keys"]):
        # transformers fills them with random numbers, others at every start.
        raise Unsupported(
            f"The weights in {folder} lack {len(missing)} tensors of {type(model).__name__}, such as {missing[0]}.",
            hint="Copy or download the model again; config.json and the weights must be of the same model.",
        )
    return (model if device_map else model.to(device)).eval()


def _require_attention(config: PretrainedConfig, *, stateful: bool = False) -> None:
    """Refuse layers whose states are not the keys and values of each position, which padding would change.

    Args:
        config: configuration of the model.
        stateful: the model's class has states of its own.

    Raises:
        Unsupported: the model has such layers.
    """
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - _ATTENTION
    if kinds or stateful:
        name = next(iter(config.architectures or ()), config.model_type)
        raise Unsupported(
            f"{name} has layers of the kind {', '.join(sorted(kinds)) or 'recurrent'}, whose states padding would "
            "change.",
            hint=ATTENTION_HINT,
        )


class TransformersEngine:
    """Runs a causal language model with transformers.

    Args:
        model: the model in evaluation mode, on its device.
        cr_kind: representation that the engine returns.
        prefix_cache_bytes: bound on the cached attention states; 0 disables the cache, so that every token is run.
        prefix_cache_ttl: seconds after their last use at which cached states are removed.
        pack_weights: on a CPU, change the model's linear layers to a faster layout, and also hold the LM head in it.

    Attributes:
        info: description of the model.
        head: the model's LM head.
        stats: statistics of what was run.

    Raises:
        Unsupported: the model is no attention-based decoder, or lacks the representation.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        cr_kind: CrKind,
        prefix_cache_bytes: int = 2**28,
        prefix_cache_ttl: float = 600,
        pack_weights: bool = False,
    ) -> None:
        config = model.config.get_text_config()
        output = linear_head(model)
        _require_attention(model.config, stateful=getattr(model, "_is_stateful", False))
        self._model = model
        self._returns_ffn_output = cr_kind == "ffn_output"
        if pack_weights:
            pack_linear_layers(model.base_model)
        self._runner = ModelRunner(
            model,
            ffn_output=self._returns_ffn_output,
            prefix_cache_bytes=prefix_cache_bytes,
            prefix_cache_ttl=prefix_cache_ttl,
        )
        self.stats = self._runner.stats
        self.head = head_from_config(
            config, output.weight.detach(), None if output.bias is None else output.bias.detach()
        )
        # On the device of the states: if the model is spread over devices, its head is on the last one.
        self._vocab = VocabReduction(self.head.to(self._runner.device), packed=pack_weights)
        self.info = EngineInfo(
            hidden_size=self.head.weight_V_D.shape[1],
            vocab_size=self.head.weight_V_D.shape[0],
            max_tokens=getattr(config, "max_position_embeddings", None),
            dtype=str(model.dtype).removeprefix("torch."),
            cr_kind=cr_kind,
            eos_token_ids=eos_token_ids(config, getattr(model, "generation_config", None)),
        )

    def is_alive(self) -> bool:
        """Return True: the engine runs in this process."""
        return True

    def reset(self) -> None:
        """Remove all cached states, and start the statistics again."""
        self._runner.reset()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Check on a real forward pass that softmax(head(last hidden state)) is the model's distribution.

        Raises:
            Unsupported: the logits are not the head of the last hidden state, or the representation is not as wide as
                the head's input.
        """
        ids_B_T = torch.arange(1, 9, device=self._runner.device).remainder(self.info.vocab_size)[None]
        expected = self._model(input_ids=ids_B_T, use_cache=False).logits.float()
        state = self._runner.encode(ids_B_T.tolist(), [])
        ours = self.head.logits(state.last_hidden_B_T_D.to(self.head.weight_V_D.device)).float().to(expected.device)
        logsumexp_T, _, top_logit_T = self._vocab.logsumexp_top1(state.last_hidden_B_T_D[0])
        differences = [
            ours - expected,
            logsumexp_T - expected[0].logsumexp(dim=-1),
            top_logit_T - expected[0].amax(dim=-1),
        ]
        largest = torch.stack([difference.abs().max() for difference in differences]).max()
        error = (largest / expected.abs().max().clamp(min=1e-6)).item()
        tolerance = 1e-4 if self._model.dtype == torch.float32 else 3e-2
        if not error <= tolerance:
            raise Unsupported(
                f"The logits of {type(self._model).__name__} are not head(last hidden state): relative difference "
                f"{error:.1e}.",
                hint="This architecture changes the logits in an unsupported way; please report it.",
            )
        if state.cr_B_T_D.shape != state.last_hidden_B_T_D.shape:
            raise Unsupported(
                f"The feed-forward output of {type(self._model).__name__} is {state.cr_B_T_D.shape[-1]} wide, its head "
                f"takes {self.info.hidden_size}.",
                hint="An adapter cannot map one to the other; serve --cr-kind last_hidden_state.",
            )
        log.info("warm-up: logits agree with the model's own to %.1e", error)

    @torch.inference_mode()
    def encode(self, batch: EncodeBatch) -> Encoded:
        """Representations of all positions ≥ `from_position` of every sequence, from one forward pass."""
        token_ids, starts = batch.token_ids, batch.from_position
        shared = self._runner.shared_states(batch.tenant, token_ids, at_most=min(starts))
        run = self._runner.encode(token_ids, shared)
        bounds = [(start, len(ids)) for ids, start in zip(token_ids, starts, strict=True)]
        indices = [i for row, (start, stop) in enumerate(bounds) for i in run.flat_positions(row, start, stop)]
        indices_N = self._runner.to_device(torch.tensor(indices))
        cr_N_D, last_hidden_N_D, logsumexp_N = run.cr_B_T_D.flatten(0, 1).index_select(0, indices_N), None, None
        if self._returns_ffn_output:
            last_hidden_N_D = run.last_hidden_B_T_D.flatten(0, 1).index_select(0, indices_N)
        if batch.with_logsumexp:
            logsumexp_N, _, _ = self._vocab.logsumexp_top1(cr_N_D if last_hidden_N_D is None else last_hidden_N_D)
        ran_B_T, cr_N_D, last_hidden_N_D, logsumexp_N = to_host(run.token_ids_B_T, cr_N_D, last_hidden_N_D, logsumexp_N)
        return Encoded(
            rows=[stop - start for start, stop in bounds],
            echo=[
                token_crc32([*ids[:first], *row[: len(ids) - first]])
                for ids, row, first in zip(token_ids, ran_B_T.tolist(), run.first_position, strict=True)
            ],
            cr_N_D=cr_N_D,
            last_hidden_N_D=last_hidden_N_D,
            logsumexp_N=logsumexp_N,
        )

    def evict_idle(self) -> None:
        """Remove cached states that were not used for `prefix_cache_ttl` seconds. Any thread may call it."""
        self._runner.evict_idle()

    def drafting(self, batch_tokens: int) -> BatchedDrafting:
        """A new, empty `BatchedDrafting`, whose passes have at most `batch_tokens` tokens."""
        return BatchedDrafting(
            self._runner, self._vocab, batch_tokens=batch_tokens, with_last_hidden=self._returns_ffn_output
        )

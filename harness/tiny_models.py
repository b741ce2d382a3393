"""Tiny models of many architectures, made on the fly: deterministic, and without a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 2
_SPECIAL = ["<pad>", "<bos>", "<eos>"]
_WORDS = ["en", "er", "ch", "th", "he", "in", "Ġd", "Ġt", "Ġth", "Ġthe", "ie", "Ġdie", "st", "an", "on", "re"]
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB_SIZE = len(_SPECIAL) + len(_ALPHABET) + len(_WORDS)
WINDOW = 8
"""Tokens that a sliding layer of the tiny Mistral, Gemma 2 and Gemma 3 sees."""
MAX_POSITIONS = 128
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)

for_vllm = False
"""Models that vLLM's kernels for CPUs can run."""


def tiny_tokenizer(*, chat_template: str | dict[str, str] | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a few merges: any text round-trips, `<bos>` is added, a newline is one token."""
    merges = [("e", "n"), ("e", "r"), ("c", "h"), ("t", "h"), ("h", "e"), ("i", "n"), ("Ġ", "d"), ("Ġ", "t")]
    merges += [("Ġ", "th"), ("Ġt", "he"), ("i", "e"), ("Ġd", "ie"), ("s", "t"), ("a", "n"), ("o", "n"), ("r", "e")]
    vocab = {token: i for i, token in enumerate([*_SPECIAL, *_ALPHABET, *_WORDS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_SPECIAL[PAD], bos_token=_SPECIAL[BOS], eos_token=_SPECIAL[EOS]
    )
    fast.chat_template = chat_template
    return fast


_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_GQA = _COMMON | {"intermediate_size": 48, "num_key_value_heads": 2}
_OPT = _COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
_GEMMA = _GQA | {"head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}
_SLIDING_AND_FULL = ["sliding_attention", "sliding_attention", "full_attention"]

ARCHITECTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "opt": lambda: transformers.OPTConfig(**_OPT),
    # As OPT-350m: norms after the sums, and a head narrower than the blocks.
    "opt-projected": lambda: transformers.OPTConfig(
        **_OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}
    ),
    "llama": lambda: transformers.LlamaConfig(**_GQA),
    "mistral": lambda: transformers.MistralConfig(**_GQA, head_dim=8, sliding_window=WINDOW),
    "qwen2": lambda: transformers.Qwen2Config(**_GQA),
    "qwen3": lambda: transformers.Qwen3Config(**_GQA, head_dim=8, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=MAX_POSITIONS,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **_GEMMA, final_logit_softcapping=3.0, attn_logit_softcapping=5.0, layer_types=_SLIDING_AND_FULL
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_GEMMA, layer_types=_SLIDING_AND_FULL),
    "phi": lambda: transformers.PhiConfig(**_GQA),  # a head with a bias
    "cohere": lambda: transformers.CohereConfig(**_GQA, logit_scale=0.25),
    "granite": lambda: transformers.GraniteConfig(
        **_GQA, logits_scaling=4.0, residual_multiplier=0.5, embedding_multiplier=2.0, attention_multiplier=0.5
    ),
}
WINDOWED = ("mistral", "gemma2", "gemma3")
TELLING = ("llama", "gemma2", "opt")
"""Architectures that differ most: a plain one; one with windows and soft caps; one with learned positions."""


def _config(architecture: str) -> PretrainedConfig:
    config = ARCHITECTURES[architecture]()
    if for_vllm:
        # Its kernels for CPUs take no heads narrower than 32.
        if architecture not in ("llama", "qwen3", *WINDOWED):
            config.num_attention_heads = 1
            if hasattr(config, "num_key_value_heads"):
                config.num_key_value_heads = 1
        if hasattr(config, "head_dim"):
            config.head_dim = 32
        if architecture == "gemma2":
            config.attn_logit_softcapping = None  # which they get wrong: the engine refuses it
    return config


def build_model(architecture: str) -> PreTrainedModel:
    """A randomly initialised model: every weight, norm and bias differs from its neutral value, top-1 tokens vary."""
    model = transformers.AutoModelForCausalLM.from_config(_config(architecture), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("bias"):
                weight.copy_(0.1 * noise)
            elif weight.ndim == 1:
                # Norms of both signs, or tied embeddings would make every token predict itself.
                weight.copy_(3 * noise - 1.0 if "gemma" in architecture else noise.sign() + 0.3 * noise)
            else:
                weight.copy_(0.3 * noise)
    return model.eval()


def save_model(architecture: str, folder: Path, *, chat_template: str | dict[str, str] | None = None) -> Path:
    """Write `build_model(architecture)` and a tokenizer into a folder, in the Hugging Face layout."""
    build_model(architecture).save_pretrained(folder)
    tiny_tokenizer(chat_template=chat_template).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class TinyModels:
    """Folders of tiny models by architecture, made at first use. Only Llama has a chat template."""

    root: Path

    def __getitem__(self, architecture: str) -> Path:
        folder = self.root / architecture
        if not folder.is_dir():
            save_model(architecture, folder, chat_template=CHAT_TEMPLATE if architecture == "llama" else None)
        return folder

"""Tiny models made on the fly, a service over one, and the REST application behind a real uvicorn.

Everything here is deterministic and needs no network. Tests get at it through the fixtures in `conftest.py`.
"""

from __future__ import annotations

import asyncio
import copy
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
import uvicorn
from fastapi import FastAPI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from plm_owner_server.admission.authentication import Authenticator
from plm_owner_server.admission.controller import ServiceHolder
from plm_owner_server.engines.interface import Engine
from plm_owner_server.engines.loading import load_engine
from plm_owner_server.engines.model_files.sources import digest_folder
from plm_owner_server.engines.model_files.tokenizer import load_tokenizer
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.settings import ServerSettings
from plm_owner_server.transports.grpc_server import serve_grpc
from plm_owner_server.transports.http_protocol import bounded_http_protocol
from plm_owner_server.transports.rest_app import create_app
from tests import guard

PAD, BOS, EOS = 0, 1, 2
_SPECIAL = ["<pad>", "<bos>", "<eos>"]
_WORDS = ["en", "er", "ch", "th", "he", "in", "Ġd", "Ġt", "Ġth", "Ġthe", "ie", "Ġdie", "st", "an", "on", "re"]
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB_SIZE = len(_SPECIAL) + len(_ALPHABET) + len(_WORDS)
MASTER_SECRET = b"the master secret of all servers in tests"
WINDOW = 8
"""Tokens that a sliding layer of the tiny Mistral, Gemma 2 and Gemma 3 sees."""
MAX_POSITIONS = 128
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


engine = "transformers"
"""What runs the models of all servers (`pytest --engine`)."""


def use_engine(name: str) -> None:
    """Let all servers, those of their own process included, run their models so."""
    global engine
    engine = name
    if name == "vllm":
        # Of a tiny model's attention states there are few, and compiling it takes longer than it ever runs.
        options = '{"kv_cache_memory_bytes": 67108864, "enforce_eager": true}'
        os.environ |= {"PEMA_ENGINE": name, "PEMA_VLLM_OPTIONS": options}


def tiny_tokenizer(*, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a few merges: any text round-trips, `<bos>` is added, `\\n` is one token."""
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


def _config(architecture: str) -> PretrainedConfig:
    config = ARCHITECTURES[architecture]()
    if engine == "vllm":
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


def save_model(architecture: str, folder: Path, *, chat_template: str | None = None) -> Path:
    """Write `build_model(architecture)` and a tokenizer into a folder, in the Hugging Face layout."""
    build_model(architecture).save_pretrained(folder)
    tiny_tokenizer(chat_template=chat_template).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class TinyModels:
    """Folders of tiny models by architecture, made when first asked for. Llama has a chat template, the others none."""

    root: Path

    def __getitem__(self, architecture: str) -> Path:
        folder = self.root / architecture
        if not folder.is_dir():
            save_model(architecture, folder, chat_template=CHAT_TEMPLATE if architecture == "llama" else None)
        return folder


def make_settings(**settings: Any) -> ServerSettings:
    """Server settings that no `.env` file of the developer changes."""
    return ServerSettings(_env_file=None, **settings)


def make_service(
    folder: Path, *, wrap: Callable[[Any], Engine] | None = None, shared: bool = True, **settings: Any
) -> PlmService:
    """The service over the model in `folder`, float32 on the CPU, warmed up.

    Args:
        wrap: puts something around the engine, for tests of failures.
        shared: the processes behind the engine may be those of another service, where it has any.
        settings: of `ServerSettings`.
    """
    chosen = make_settings(model=str(folder), device="cpu", dtype="float32", **settings)
    engine = _engine(folder, chosen) if shared else load_engine(folder, chosen)
    return PlmService(
        wrap(engine) if wrap else engine,
        load_tokenizer(folder),
        name=folder.name,
        weights_digest=digest_folder(folder),
        settings=chosen,
        master_secret=lambda: MASTER_SECRET,
    )


def _engine(folder: Path, settings: ServerSettings) -> Engine:
    if settings.engine == "transformers":
        return load_engine(folder, settings)
    # Its start takes many seconds; a copy, as a test may change what it does.
    return copy.copy(_started(folder, settings.prefix_cache_mib > 0))


@lru_cache(maxsize=2)  # each is a process
def _started(folder: Path, prefix_cache: bool) -> Engine:
    mib = 64 if prefix_cache else 0
    return load_engine(folder, make_settings(device="cpu", dtype="float32", prefix_cache_mib=mib))


@contextmanager
def run_app(app: FastAPI, *, max_connections: int = 1000, transfer_s: float = 30.0) -> Iterator[str]:
    """Run an ASGI application with uvicorn in a thread on a free port, as the server does; gives its base URL."""
    # With its protocol named, or asyncio would not turn Nagle's delay of 40 ms off.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        http: Any = bounded_http_protocol(max_connections, transfer_s)
        context = guard.current.certificate.context() if guard.current else None
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            http=http,
            ws="none",
            ssl_context_factory=(lambda *_: context) if context else None,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="uvicorn")
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            yield guard.url("http", listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def serve(
    service: PlmService | None,
    *,
    max_body_bytes: int | None = None,
    access: Authenticator | None = None,
    **connections: Any,
) -> Iterator[str]:
    """Serve over REST and give the base URL; without a service, as a server whose model is still loading."""
    with serve_holder(_holder(service, access), max_body_bytes=max_body_bytes, **connections) as url:
        yield url


def _holder(service: PlmService | None, access: Authenticator | None) -> ServiceHolder:
    return ServiceHolder(service, access or guard.access())


@contextmanager
def serve_holder(holder: ServiceHolder, *, max_body_bytes: int | None = None, **connections: Any) -> Iterator[str]:
    """Serve over REST and give the base URL."""
    if max_body_bytes is None:
        max_body_bytes = holder.service.model_card().limits.max_body_bytes if holder.service else 2**20
    with run_app(create_app(holder, max_body_bytes=max_body_bytes), **connections) as url:
        yield url


@contextmanager
def serve_over_grpc(
    service: PlmService | None, *, max_body_bytes: int = 2**24, access: Authenticator | None = None, **connections: Any
) -> Iterator[str]:
    """Serve over gRPC on an event loop of its own and give the address, grpc://…."""
    with serve_holder_over_grpc(_holder(service, access), max_body_bytes=max_body_bytes, **connections) as url:
        yield url


@contextmanager
def serve_holder_over_grpc(holder: ServiceHolder, *, max_body_bytes: int = 2**24, **connections: Any) -> Iterator[str]:
    """Serve over gRPC on an event loop of its own and give the address, grpc://…."""
    ready, stop = threading.Event(), threading.Event()
    ports: list[int] = []
    credentials = guard.current.certificate.grpc_credentials() if guard.current else None

    async def run() -> None:
        async with serve_grpc(
            holder,
            "127.0.0.1",
            0,
            max_body_bytes=max_body_bytes,
            max_calls=64,
            credentials=credentials,
            **connections,
        ) as port:
            ports.append(port)
            ready.set()
            while not stop.is_set():
                await asyncio.sleep(0.02)

    thread = threading.Thread(target=asyncio.run, args=(run(),), name="grpc")
    thread.start()
    try:
        assert ready.wait(60)
        yield guard.url("grpc", ports[0])
    finally:
        stop.set()
        thread.join()


def until(true: Callable[[], bool], *, within_s: float) -> None:
    """Wait for something, and fail if it takes too long."""
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def random_ids(seed: int, lengths: Sequence[int], *, shared: int = 0) -> list[list[int]]:
    """Sequences of the given lengths without special tokens, the first `shared` ids of all being the same."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
    prefix = torch.randint(3, VOCAB_SIZE, (shared,), generator=generator).tolist()
    return [(prefix + row)[: max(len(row), 1)] for row in rows]

"""Settings of the owner's server, each with its default, its unit and its purpose.

A flag `--max-sequence-tokens 2048`, the environment variable `PEMA_MAX_SEQUENCE_TOKENS=2048` and a line of `.env` set
the same thing. A flag wins over the environment, the environment over `.env`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

from platformdirs import user_cache_path, user_data_path
from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_core import from_json
from pydantic_settings import CliImplicitFlag, NoDecode, SettingsConfigDict

from plm_owner_server.setting_values import (
    Address,
    Bytes,
    File,
    Folder,
    HostRules,
    Metavar,
    Number,
    Port,
    Seconds,
    SettingsGroup,
    Tokens,
)
from protocol.types import CrKind

DEFAULT_MODEL = "gemma-3-270m"
# Largest number that gRPC carries, or takes as an option.
_INT32 = 2**31 - 1


@dataclass(frozen=True)
class EngineEntry:
    """An engine that `--engine` may name.

    Attributes:
        module: module with the function `load(folder, settings)`. It is imported when the engine is chosen.
        unsupported: names of the settings that must keep their defaults with this engine.
        cr_kinds: representations that the engine can serve.
    """

    module: str
    unsupported: tuple[str, ...] = ()
    cr_kinds: tuple[CrKind, ...] = get_args(CrKind)


ENGINES: Mapping[str, EngineEntry] = {
    "transformers": EngineEntry(
        "plm_owner_server.engines.transformers.loading",
        unsupported=(
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "distributed_executor_backend",
            "vllm_options",
        ),
    ),
    "vllm": EngineEntry(
        "plm_owner_server.engines.vllm.loading",
        unsupported=("device_map",),
        cr_kinds=("last_hidden_state",),
    ),
}
"""All engines by name. The first is the default."""


def _default_store() -> str:
    return f"sqlite:///{user_data_path('pema') / 'owner.db'}"


class ModelSettings(SettingsGroup):
    """The model, and the representation to serve."""

    model_config = SettingsConfigDict(title="Model")

    model: Annotated[str, Metavar("MODEL")] = Field(
        default=DEFAULT_MODEL,
        description="Model to serve: gemma-3-270m or smollm2-135m (embedded), a hub id, a folder or a .gguf file.",
    )
    revision: Annotated[str | None, Metavar("REVISION")] = Field(
        default=None,
        description="Branch, tag or commit of a model of the hub, so that every start serves the same weights. By "
        "default the newest.",
    )
    cr_kind: CrKind = Field(
        default="last_hidden_state",
        description="Representation to serve: the LM head's input, or the last feed-forward output as in the paper.",
    )
    device: Annotated[str, Metavar("DEVICE")] = Field(
        default="auto",
        description="Torch device of the model; auto takes CUDA if there is one. With vLLM, of the LM head that "
        "clients read alone; auto takes the CPU.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="dtype of the weights; auto is bfloat16 on CUDA (half the memory) and float32 on CPU (exact, "
        "fast).",
    )
    threads: Number = Field(
        default=0,
        ge=0,
        description="CPU threads of the model; 0 takes all cores that the process may use, by its affinity and its "
        "container's CPU quota. Use fewer to leave room for a client on the machine.",
    )
    pack_weights: CliImplicitFlag[bool] = Field(
        default=True,
        description="CPU and float32, not with vLLM: store the weights in the layout that multiplies fastest. Decoding "
        "takes between 0.44 and 0.61 of the time (1.6 to 2.3 times as fast); the LM head takes twice the memory.",
    )
    cache_dir: Folder = Field(
        default_factory=lambda: user_cache_path("pema") / "models",
        description="Folder for converted GGUF models and digests of weights, so that only the first start is slow. By "
        "default in the user's cache folder.",
    )


class EngineSettings(SettingsGroup):
    """The engine that runs the model, and its own options."""

    model_config = SettingsConfigDict(title="Engine")

    engine: Annotated[str, Metavar(f"{{{','.join(ENGINES)}}}")] = Field(
        default=next(iter(ENGINES)),
        description=f"Engine that runs the model: {' or '.join(ENGINES)}. vllm (pip install -e '.[server,vllm]') is "
        "for models that need several GPUs and for many clients on one.",
    )
    device_map: Annotated[str | None, Metavar("MAP")] = Field(
        default=None,
        description="transformers: placement of layers on several devices, as in accelerate (auto, balanced, "
        "sequential), for a model that fits no single GPU. Wins over --device, where all layers are by default.",
    )
    tensor_parallel_size: Annotated[int, Metavar("GPUS")] = Field(
        default=1, ge=1, description="vLLM: GPUs of one node that share every layer."
    )
    pipeline_parallel_size: Annotated[int, Metavar("GROUPS")] = Field(
        default=1, ge=1, description="vLLM: groups of GPUs, such as nodes, that hold a part of the layers each."
    )
    distributed_executor_backend: Annotated[str | None, Metavar("BACKEND")] = Field(
        default=None,
        description="vLLM: backend that starts its workers, mp on one node or ray on several. By default vLLM chooses.",
    )
    vllm_options: Annotated[dict[str, Any], NoDecode, Metavar("JSON")] = Field(
        default_factory=dict,
        description="vLLM: other AsyncEngineArgs, as a JSON object, without those that have a flag here. For example "
        """'{"gpu_memory_utilization": 0.8}'. Empty by default.""",
    )

    @field_validator("engine")
    @classmethod
    def _is_an_engine(cls, value: str) -> str:
        if value not in ENGINES:
            raise ValueError(f"there is no engine {value}; use {' or '.join(ENGINES)}")
        return value

    @field_validator("vllm_options", mode="before")
    @classmethod
    def _is_json(cls, value: Any) -> Any:
        # Parsed here, because bad JSON is no ValidationError where pydantic-settings parses it.
        return from_json(value.encode() or b"{}") if isinstance(value, str) else value


class NetworkSettings(SettingsGroup):
    """Addresses, and what a connection may take."""

    model_config = SettingsConfigDict(title="Network")

    host: Address = Field(
        default="127.0.0.1",
        description="Address to listen on. Any but loopback needs tenants (pema-server tenants add) or "
        "--allow-anonymous.",
    )
    port: Port = Field(default=8000, description="TCP port of REST; 0 takes a free one.")
    grpc_port: Port | None = Field(
        default=None,
        description="TCP port of gRPC; 0 takes a free one. By default the one after --port, where clients look for it.",
    )
    max_connections: Number = Field(
        default=1000,
        ge=1,
        le=_INT32,
        description="Connections at a time, for each transport; each takes a file. A further one replaces the one that "
        "has been idle longest, or is refused with 429.",
    )
    transfer_timeout: Seconds = Field(
        default=30.0,
        ge=0.1,
        allow_inf_nan=False,
        description="Longest time in seconds for a TLS handshake, a request's head, and each MiB of a body or an "
        "answer. Slower clients are disconnected.",
    )
    allowed_hosts: HostRules = Field(
        default=(),
        description="Names by which clients may call a server without tenants and TLS, besides loopback ones, such as "
        "gpu.example.com or *.example.com; * allows all. It refuses web pages that point their own name to this "
        "machine. If --host is not loopback, IP addresses and names without a dot or below .local, .internal and "
        "home.arpa are always allowed.",
    )


class TlsSettings(SettingsGroup):
    """Certificates of both transports."""

    model_config = SettingsConfigDict(title="TLS")

    tls_certificate: File | None = Field(
        default=None,
        description="PEM file with the server's certificate chain, for TLS on both transports. A renewed file is used "
        "without a restart. No TLS by default.",
    )
    tls_key: File | None = Field(
        default=None, description="PEM file with the private key of --tls-certificate, without a password."
    )
    tls_client_ca: File | None = Field(
        default=None,
        description="PEM file with the CAs of client certificates, which both transports then demand. The common name "
        "is the tenant's name; keys are optional. By default none are demanded.",
    )
    insecure: CliImplicitFlag[bool] = Field(
        default=False,
        description="Let keys travel unencrypted to addresses other than loopback, as behind a proxy that does TLS.",
    )

    @model_validator(mode="after")
    def _certificate_and_key_go_together(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("--tls-certificate and --tls-key go together")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("--tls-client-ca needs --tls-certificate and --tls-key")
        return self


class StoreSettings(SettingsGroup):
    """Location of the tenant database."""

    model_config = SettingsConfigDict(title="Tenants")

    store: Annotated[str, Metavar("URL")] = Field(
        default_factory=_default_store,
        description="Database of the tenants, as an SQLAlchemy URL: sqlite:////var/lib/pema/owner.db or "
        "postgresql+psycopg://owner@db/pema. By default a SQLite file in the user's data folder.",
    )


class TenantSettings(StoreSettings):
    """Tenants, and the secret of their bases."""

    master_secret: Annotated[SecretStr | None, Metavar("SECRET")] = Field(
        default=None,
        min_length=32,
        description="Secret from which the tenants' bases are derived (openssl rand -hex 32). Set it as "
        "PEMA_MASTER_SECRET, equal on all servers that share a store. By default it is in a file next to SQLite's.",
    )
    allow_anonymous: CliImplicitFlag[bool] = Field(
        default=False,
        description="Listen on any address without tenants: every client that reaches the server may call it.",
    )


class RequestLimits(SettingsGroup):
    """Limits of one request."""

    model_config = SettingsConfigDict(title="Limits of a request")

    max_sequence_tokens: Tokens = Field(
        default=4096,
        ge=2,
        le=_INT32,
        description="Longest sequence in tokens, drafts included; it bounds attention memory. The model's own limit "
        "applies too.",
    )
    max_sequences: Number = Field(
        default=512,
        ge=1,
        le=_INT32,
        description="Most sequences in one request; it bounds how long one request occupies the model.",
    )
    max_look_ahead: Tokens = Field(
        default=1024,
        ge=0,
        le=_INT32,
        description="Most tokens drafted per sequence and request; it bounds the time of one request.",
    )
    max_answer_bytes: Bytes = Field(
        default=128 * 2**20,
        ge=1,
        le=2**34,
        description="Largest answer in bytes, counted as float32; it bounds memory. Clients split larger requests.",
    )
    max_body_bytes: Bytes = Field(
        default=16 * 2**20,
        ge=1024,
        le=_INT32,
        description="Largest request body in bytes; it bounds memory per request.",
    )


class SharedLimits(SettingsGroup):
    """Limits of what all requests share: passes, the queue and the cache."""

    model_config = SettingsConfigDict(title="Limits of all requests together")

    max_batch_tokens: Tokens = Field(
        default=4096,
        ge=1,
        description="Tokens in one forward pass, padding included. More takes more memory, and lets a short request "
        "wait longer for another client's long one.",
    )
    max_batch_padding: Tokens = Field(
        default=256,
        ge=0,
        description="Padding in one forward pass, in tokens. Set it to about the cost of one more pass: higher on a "
        "fast GPU.",
    )
    max_draft_tokens: Tokens = Field(
        default=2**15,
        ge=1,
        description="Tokens of all sequences being drafted, whose attention states are held together; it bounds "
        "memory. One client may have half of them; further requests wait.",
    )
    max_waiting_requests: Number = Field(
        default=64,
        ge=1,
        description="Requests that may wait for the model; those in progress count, too. One client may have half of "
        "them. Further requests are refused with 429.",
    )
    max_waiting_tokens: Tokens = Field(
        default=2**19,
        ge=1,
        description="Tokens of all requests that may wait for the model, half of them one client's; it bounds their "
        "answers' memory. Further requests are refused with 429.",
    )
    prefix_cache_mib: Annotated[float, Metavar("MIB")] = Field(
        default=1024,
        ge=0,
        allow_inf_nan=False,
        description="Memory for attention states of cached prefixes, in MiB; 0 turns the cache off. vLLM also holds "
        "running texts in it on a CPU, and takes all free memory on GPUs.",
    )
    prefix_cache_ttl: Seconds = Field(
        default=600,
        gt=0,
        description="Seconds after their last use for which attention states stay cached. vLLM empties its whole cache "
        "this long after the first entry.",
    )

    @property
    def prefix_cache_bytes(self) -> int:
        """`prefix_cache_mib` in bytes."""
        return int(self.prefix_cache_mib * 2**20)


class OperationSettings(SettingsGroup):
    """Metrics, log, and the end of the process."""

    model_config = SettingsConfigDict(title="Operations")

    metrics_port: Port | None = Field(
        default=None,
        description="TCP port of Prometheus metrics (/metrics); 0 takes a free one. No metrics by default.",
    )
    metrics_host: Address = Field(
        default="127.0.0.1",
        description="Address of --metrics-port, which asks for no key: every client that reaches it can read the "
        "metrics.",
    )
    engine_timeout: Seconds = Field(
        default=600,
        gt=0,
        description="Longest time in seconds for one forward pass. After it the server takes the model for stuck and "
        "exits with a status other than 0.",
    )
    drain_timeout: Seconds = Field(
        default=30,
        ge=0,
        description="Seconds that calls in progress have after SIGTERM or SIGINT, while new ones are refused with 503. "
        "A second signal stops at once.",
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="Format of the log on standard error: lines for people, or one JSON object a line."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Verbosity of the log. No level writes texts, token ids or representations."
    )


class ServerSettings(  # pydantic puts the fields of the last class first
    OperationSettings,
    SharedLimits,
    RequestLimits,
    TenantSettings,
    TlsSettings,
    NetworkSettings,
    EngineSettings,
    ModelSettings,
):
    """Start the PLM owner's server."""

    @model_validator(mode="after")
    def _engine_has_the_representation(self) -> Self:
        kinds = ENGINES[self.engine].cr_kinds
        if self.cr_kind not in kinds:
            others = _engine_flags(name for name, entry in ENGINES.items() if self.cr_kind in entry.cr_kinds)
            raise ValueError(
                f"--cr-kind {self.cr_kind} is not supported by --engine {self.engine}; "
                f"use {' or '.join(kinds)}, or {others}"
            )
        return self

    @model_validator(mode="after")
    def _engine_has_what_is_set(self) -> Self:
        for name in ENGINES[self.engine].unsupported:
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                others = _engine_flags(other for other, entry in ENGINES.items() if name not in entry.unsupported)
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} is not supported by --engine {self.engine}; remove it or use {others}")
        return self


def _engine_flags(names: Iterable[str]) -> str:
    return " or ".join(f"--engine {name}" for name in names)

"""Everything an owner can set, each with its unit and the reason it exists.

A flag `--max-sequence-tokens 2048`, the environment variable `PEMA_MAX_SEQUENCE_TOKENS=2048` and a line of `.env` mean
the same; a flag wins over the environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from platformdirs import user_cache_path, user_data_path
from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_core import from_json
from pydantic_settings import BaseSettings, CliImplicitFlag, NoDecode, SettingsConfigDict

from protocol.types import CrKind

DEFAULT_MODEL = "gemma-3-270m"
# Largest number that gRPC carries, or takes as an option.
_INT32 = 2**31 - 1


def _in_a_file_of_the_users_own() -> str:
    return f"sqlite:///{user_data_path('pema') / 'owner.db'}"


class StoreSettings(BaseSettings):
    """Where what must outlive the server is kept."""

    model_config = SettingsConfigDict(env_prefix="PEMA_", env_file=".env", extra="ignore", protected_namespaces=())

    store: str = Field(
        default_factory=_in_a_file_of_the_users_own,
        description="Database of the tenants, as SQLAlchemy's URL: sqlite:////var/lib/pema/owner.db or "
        "postgresql+psycopg://owner@db/pema.",
    )


class ServerSettings(StoreSettings):
    """Start the PLM owner's server."""

    model: str = Field(
        default=DEFAULT_MODEL,
        description="gemma-3-270m or smollm2-135m (embedded), a hub id, a folder or a .gguf file. The model served.",
    )
    host: str = Field(
        default="127.0.0.1",
        description="Address to listen on. Others than loopback need tenants (pema-server tenants add), --api-key, or "
        "--allow-anonymous.",
    )
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one.")
    grpc_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="TCP port of gRPC; 0 takes a free one. By default the one after --port: clients find it there.",
    )
    api_key: SecretStr | None = Field(
        default=None,
        min_length=8,
        description="One key for all clients, instead of tenants. Set it as PEMA_API_KEY: everybody on the machine can "
        "see flags.",
    )
    master_secret: SecretStr | None = Field(
        default=None,
        min_length=32,
        description="What the tenants' secret bases follow from; set it as PEMA_MASTER_SECRET, the same for all that "
        "share a store (openssl rand -hex 32). By default one is made and kept beside the SQLite file.",
    )
    allow_anonymous: CliImplicitFlag[bool] = Field(
        default=False, description="Listen on any address without tenants and keys: whoever reaches it may call."
    )
    tls_certificate: Path | None = Field(
        default=None,
        description="PEM file with the server's certificate chain: both transports then speak TLS. Renewed files are "
        "taken without a restart.",
    )
    tls_key: Path | None = Field(default=None, description="PEM file with its private key, without a password.")
    tls_client_ca: Path | None = Field(
        default=None,
        description="PEM file with the authorities of clients' certificates: both transports then demand one, and its "
        "subject's common name is the tenant's; no key is needed.",
    )
    insecure: CliImplicitFlag[bool] = Field(
        default=False,
        description="Let keys travel unencrypted to other addresses than loopback, such as behind a proxy that does "
        "TLS itself.",
    )

    @model_validator(mode="after")
    def _certificate_and_key_go_together(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("--tls-certificate and --tls-key go together")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("--tls-client-ca needs --tls-certificate and --tls-key")
        return self

    @model_validator(mode="after")
    def _engine_has_the_representation(self) -> Self:
        if self.engine == "vllm" and self.cr_kind != "last_hidden_state":
            raise ValueError(
                f"--engine vllm gives no --cr-kind {self.cr_kind}: take last_hidden_state, or --engine transformers"
            )
        return self

    @model_validator(mode="after")
    def _engine_has_what_is_set(self) -> Self:
        of_vllm = ["tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"]
        of_vllm += ["distributed_executor_backend", "vllm_options"]
        for name in ["device_map"] if self.engine == "vllm" else of_vllm:
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} is nothing to --engine {self.engine}: leave it out, or take the other engine")
        return self

    @field_validator("vllm_options", mode="before")
    @classmethod
    def _is_json(cls, value: Any) -> Any:
        # Here, and not where settings are read: there, bad JSON is no ValidationError.
        return from_json(value or "{}") if isinstance(value, str) else value

    @field_validator("api_key")
    @classmethod
    def _fits_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not (value.get_secret_value().isascii() and value.get_secret_value().isprintable()):
            raise ValueError("it has characters that no header can carry")
        return value

    engine: Literal["transformers", "vllm"] = Field(
        default="transformers",
        description="What runs the model. vllm, which is installed with pema[vllm], is for models that need several "
        "GPUs and for many clients on one.",
    )
    device_map: str | None = Field(
        default=None,
        description="transformers: how layers are spread over several devices, as accelerate knows it: auto, balanced, "
        "sequential. They work one after another: for a model that fits no single GPU. Goes before --device.",
    )
    tensor_parallel_size: int = Field(
        default=1, ge=1, description="vLLM: GPUs that share every layer; those of one node, as they talk all the time."
    )
    pipeline_parallel_size: int = Field(
        default=1, ge=1, description="vLLM: groups of GPUs that have some of the layers each, such as nodes."
    )
    data_parallel_size: int = Field(
        default=1,
        ge=1,
        description="vLLM: copies of the model behind this server. They do not share known prefixes: replicas of the "
        "server are better for decoding.",
    )
    distributed_executor_backend: str | None = Field(
        default=None, description="vLLM: what starts its workers: mp on one node, ray on several. vLLM chooses."
    )
    vllm_options: Annotated[dict[str, Any], NoDecode] = Field(
        default_factory=dict,
        description="vLLM: other options of its AsyncEngineArgs, as JSON; they win over what follows from "
        """other flags, but for those that have one. For example '{"gpu_memory_utilization": 0.8}'.""",
    )
    cr_kind: CrKind = Field(
        default="last_hidden_state",
        description="Representation served: the LM head's own input, or the last feed-forward output as in the paper.",
    )
    device: str = Field(
        default="auto",
        description="Torch device; with vLLM, that of the LM head alone. auto takes CUDA where there is one, because "
        "it is faster.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="dtype of the weights. auto: bfloat16 on CUDA (half the memory), float32 on CPU (exact and fast).",
    )
    threads: int = Field(
        default=0,
        ge=0,
        description="CPU threads of the model, 0 for all cores. Fewer leave room for a client beside it.",
    )
    pack_weights: bool = Field(
        default=True,
        description="CPU and float32: keep the weights in the layout that is multiplied by fastest. Decoding takes "
        "half the time; the LM head is held in memory twice.",
    )
    max_sequence_tokens: int = Field(
        default=4096,
        ge=2,
        le=_INT32,
        description="Longest sequence in tokens, drafts included; bounds attention memory, capped by the model's own.",
    )
    max_sequences: int = Field(
        default=512,
        ge=1,
        le=_INT32,
        description="Most sequences in a request. Bounds how long one request occupies the model.",
    )
    max_look_ahead: int = Field(
        default=1024,
        ge=0,
        le=_INT32,
        description="Most tokens drafted per sequence and request. Bounds the time of one request.",
    )
    max_answer_bytes: int = Field(
        default=128 * 2**20,
        ge=1,
        le=2**34,
        description="Largest answer in bytes, counted as float32. Bounds its memory; clients ask in pieces.",
    )
    max_body_bytes: int = Field(
        default=16 * 2**20, ge=1024, le=_INT32, description="Largest request body in bytes. Bounds memory per request."
    )
    max_connections: int = Field(
        default=1000,
        ge=1,
        le=_INT32,
        description="Connections at the same time, for each transport; each takes a file. One more takes the place of "
        "the one that is idle longest, or is told to come back.",
    )
    transfer_s: float = Field(
        default=30.0,
        ge=0.1,
        allow_inf_nan=False,
        description="Seconds that a TLS handshake, a request's head, each MiB of its body, and each MiB of an answer "
        "may take. Bounds what slow clients hold: who is slower is cut off.",
    )
    batch_tokens: int = Field(
        default=4096,
        ge=1,
        description="Tokens in one forward pass, padding included. The memory of activations grows with it, and the "
        "time that a short request may wait for another client's long one.",
    )
    padding_tokens: int = Field(
        default=256,
        ge=0,
        description="Padding in one forward pass, in tokens. About what one more pass costs: more on a fast GPU.",
    )
    drafting_tokens: int = Field(
        default=2**15,
        ge=1,
        description="Tokens whose attention states all sequences that are being drafted may come to hold together. "
        "Bounds memory; one client may have half of it, and what does not fit waits.",
    )
    prefix_cache_mib: float = Field(
        default=1024,
        ge=0,
        allow_inf_nan=False,
        description="Memory for attention states in MiB: what texts begin with is computed once, and a text that goes "
        "on is not computed again. 0 turns it off. vLLM on a CPU has running texts in it, too; on GPUs it takes what "
        "is free.",
    )
    prefix_cache_seconds: float = Field(
        default=600,
        gt=0,
        description="How long they are kept after their last use, in seconds. Then they are dropped, whether or not "
        "somebody calls. vLLM drops all of them, so long after the first was computed.",
    )
    max_waiting_requests: int = Field(
        default=64, ge=1, description="Requests that may wait for the model. One more is told to come back (429)."
    )
    max_waiting_tokens: int = Field(
        default=2**19,
        ge=1,
        description="Tokens of all requests that may wait for the model; bounds their answers' memory. More is told to "
        "come back (429). One client may fill half of it.",
    )
    metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="TCP port on which Prometheus finds metrics (/metrics); 0 takes a free one. None by default.",
    )
    metrics_host: str = Field(
        default="127.0.0.1",
        description="Address of --metrics-port. There are no keys: whoever reaches it may read the metrics.",
    )
    engine_timeout: float = Field(
        default=600,
        gt=0,
        description="Longest single piece of the model's work, in seconds. If it takes longer, it hangs: the server "
        "ends with a status other than 0, to be started again.",
    )
    drain_seconds: float = Field(
        default=30,
        ge=0,
        description="How long calls may still be worked on after SIGTERM or SIGINT, in seconds. New ones are refused "
        "(503). A second signal stops at once.",
    )
    cache_dir: Path = Field(
        default_factory=lambda: user_cache_path("pema") / "models",
        description="Folder where a GGUF model is kept once it is converted, so that only the first start is slow.",
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="Lines for people, or a JSON object each for a log store. On standard error."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Verbosity of the log. No level writes texts, token ids or representations."
    )

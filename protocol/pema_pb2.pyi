from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "data", "crc32")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    crc32: int
    def __init__(self, dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ..., crc32: _Optional[int] = ...) -> None: ...

class TokenSequences(_message.Message):
    __slots__ = ("values", "lengths")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    values: bytes
    lengths: bytes
    def __init__(self, values: _Optional[bytes] = ..., lengths: _Optional[bytes] = ...) -> None: ...

class Problem(_message.Message):
    __slots__ = ("type", "title", "status", "detail", "hint", "retry_after_s", "request_id")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    type: str
    title: str
    status: int
    detail: str
    hint: str
    retry_after_s: float
    request_id: str
    def __init__(self, type: _Optional[str] = ..., title: _Optional[str] = ..., status: _Optional[int] = ..., detail: _Optional[str] = ..., hint: _Optional[str] = ..., retry_after_s: _Optional[float] = ..., request_id: _Optional[str] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue_ms", "compute_ms", "serialise_ms")
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_MS_FIELD_NUMBER: _ClassVar[int]
    SERIALISE_MS_FIELD_NUMBER: _ClassVar[int]
    queue_ms: float
    compute_ms: float
    serialise_ms: float
    def __init__(self, queue_ms: _Optional[float] = ..., compute_ms: _Optional[float] = ..., serialise_ms: _Optional[float] = ...) -> None: ...

class GetModelCardRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetTokenizerRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_sequence_tokens", "max_sequences", "max_head_rows", "max_look_ahead", "max_rows", "max_body_bytes")
    MAX_SEQUENCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_HEAD_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_LOOK_AHEAD_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_BODY_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_sequence_tokens: int
    max_sequences: int
    max_head_rows: int
    max_look_ahead: int
    max_rows: int
    max_body_bytes: int
    def __init__(self, max_sequence_tokens: _Optional[int] = ..., max_sequences: _Optional[int] = ..., max_head_rows: _Optional[int] = ..., max_look_ahead: _Optional[int] = ..., max_rows: _Optional[int] = ..., max_body_bytes: _Optional[int] = ...) -> None: ...

class ModelCard(_message.Message):
    __slots__ = ("name", "digest", "tokenizer_digest", "cr_kind", "hidden_size", "vocab_size", "dtype", "head_dtype", "head_digest", "head_policy", "eos_token_ids", "limits", "protocol_version", "rotated", "head_bias", "softcap", "scopes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CR_KIND_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    HEAD_DTYPE_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    HEAD_POLICY_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    ROTATED_FIELD_NUMBER: _ClassVar[int]
    HEAD_BIAS_FIELD_NUMBER: _ClassVar[int]
    SOFTCAP_FIELD_NUMBER: _ClassVar[int]
    SCOPES_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    tokenizer_digest: str
    cr_kind: str
    hidden_size: int
    vocab_size: int
    dtype: str
    head_dtype: str
    head_digest: str
    head_policy: str
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    limits: Limits
    protocol_version: int
    rotated: bool
    head_bias: bool
    softcap: float
    scopes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., tokenizer_digest: _Optional[str] = ..., cr_kind: _Optional[str] = ..., hidden_size: _Optional[int] = ..., vocab_size: _Optional[int] = ..., dtype: _Optional[str] = ..., head_dtype: _Optional[str] = ..., head_digest: _Optional[str] = ..., head_policy: _Optional[str] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., protocol_version: _Optional[int] = ..., rotated: _Optional[bool] = ..., head_bias: _Optional[bool] = ..., softcap: _Optional[float] = ..., scopes: _Optional[_Iterable[str]] = ...) -> None: ...

class TokenizerPiece(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class HeadRequest(_message.Message):
    __slots__ = ("token_ids", "start", "stop", "dtype")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    token_ids: TokenIds
    start: int
    stop: int
    dtype: str
    def __init__(self, token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ..., dtype: _Optional[str] = ...) -> None: ...

class HeadRows(_message.Message):
    __slots__ = ("digest", "vocab_size", "weight_N_D", "bias_N", "logit_scale", "softcap")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_N_D_FIELD_NUMBER: _ClassVar[int]
    BIAS_N_FIELD_NUMBER: _ClassVar[int]
    LOGIT_SCALE_FIELD_NUMBER: _ClassVar[int]
    SOFTCAP_FIELD_NUMBER: _ClassVar[int]
    digest: str
    vocab_size: int
    weight_N_D: Tensor
    bias_N: Tensor
    logit_scale: float
    softcap: float
    def __init__(self, digest: _Optional[str] = ..., vocab_size: _Optional[int] = ..., weight_N_D: _Optional[_Union[Tensor, _Mapping]] = ..., bias_N: _Optional[_Union[Tensor, _Mapping]] = ..., logit_scale: _Optional[float] = ..., softcap: _Optional[float] = ...) -> None: ...

class EncodeRequest(_message.Message):
    __slots__ = ("token_ids", "from_position", "echo", "dtype", "with_logsumexp")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FROM_POSITION_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    WITH_LOGSUMEXP_FIELD_NUMBER: _ClassVar[int]
    token_ids: TokenSequences
    from_position: _containers.RepeatedScalarFieldContainer[int]
    echo: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    with_logsumexp: bool
    def __init__(self, token_ids: _Optional[_Union[TokenSequences, _Mapping]] = ..., from_position: _Optional[_Iterable[int]] = ..., echo: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., with_logsumexp: _Optional[bool] = ...) -> None: ...

class EncodeResponse(_message.Message):
    __slots__ = ("digest", "echo", "rows_B", "cr_N_D", "cr_scale_N", "last_hidden_N_D", "last_hidden_scale_N", "logsumexp_N")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    ROWS_B_FIELD_NUMBER: _ClassVar[int]
    CR_N_D_FIELD_NUMBER: _ClassVar[int]
    CR_SCALE_N_FIELD_NUMBER: _ClassVar[int]
    LAST_HIDDEN_N_D_FIELD_NUMBER: _ClassVar[int]
    LAST_HIDDEN_SCALE_N_FIELD_NUMBER: _ClassVar[int]
    LOGSUMEXP_N_FIELD_NUMBER: _ClassVar[int]
    digest: str
    echo: _containers.RepeatedScalarFieldContainer[int]
    rows_B: Tensor
    cr_N_D: Tensor
    cr_scale_N: Tensor
    last_hidden_N_D: Tensor
    last_hidden_scale_N: Tensor
    logsumexp_N: Tensor
    def __init__(self, digest: _Optional[str] = ..., echo: _Optional[_Iterable[int]] = ..., rows_B: _Optional[_Union[Tensor, _Mapping]] = ..., cr_N_D: _Optional[_Union[Tensor, _Mapping]] = ..., cr_scale_N: _Optional[_Union[Tensor, _Mapping]] = ..., last_hidden_N_D: _Optional[_Union[Tensor, _Mapping]] = ..., last_hidden_scale_N: _Optional[_Union[Tensor, _Mapping]] = ..., logsumexp_N: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class EncodeCall(_message.Message):
    __slots__ = ("request_id", "request")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    request: EncodeRequest
    def __init__(self, request_id: _Optional[str] = ..., request: _Optional[_Union[EncodeRequest, _Mapping]] = ...) -> None: ...

class Quotas(_message.Message):
    __slots__ = ("rate_limit", "rate_limit_policy")
    RATE_LIMIT_FIELD_NUMBER: _ClassVar[int]
    RATE_LIMIT_POLICY_FIELD_NUMBER: _ClassVar[int]
    rate_limit: str
    rate_limit_policy: str
    def __init__(self, rate_limit: _Optional[str] = ..., rate_limit_policy: _Optional[str] = ...) -> None: ...

class EncodePiece(_message.Message):
    __slots__ = ("request_id", "rows", "problem", "last", "timing", "quotas")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    QUOTAS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    rows: EncodeResponse
    problem: Problem
    last: bool
    timing: Timing
    quotas: Quotas
    def __init__(self, request_id: _Optional[str] = ..., rows: _Optional[_Union[EncodeResponse, _Mapping]] = ..., problem: _Optional[_Union[Problem, _Mapping]] = ..., last: _Optional[bool] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., quotas: _Optional[_Union[Quotas, _Mapping]] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("token_ids", "from_position", "look_ahead", "stop_token_ids", "echo", "dtype")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FROM_POSITION_FIELD_NUMBER: _ClassVar[int]
    LOOK_AHEAD_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    token_ids: TokenSequences
    from_position: _containers.RepeatedScalarFieldContainer[int]
    look_ahead: _containers.RepeatedScalarFieldContainer[int]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    echo: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    def __init__(self, token_ids: _Optional[_Union[TokenSequences, _Mapping]] = ..., from_position: _Optional[_Iterable[int]] = ..., look_ahead: _Optional[_Iterable[int]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., echo: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("digest", "echo", "rows_B", "cr_N_D", "cr_scale_N", "last_hidden_N_D", "last_hidden_scale_N", "logsumexp_N", "top1_N", "top1_logprob_N")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    ROWS_B_FIELD_NUMBER: _ClassVar[int]
    CR_N_D_FIELD_NUMBER: _ClassVar[int]
    CR_SCALE_N_FIELD_NUMBER: _ClassVar[int]
    LAST_HIDDEN_N_D_FIELD_NUMBER: _ClassVar[int]
    LAST_HIDDEN_SCALE_N_FIELD_NUMBER: _ClassVar[int]
    LOGSUMEXP_N_FIELD_NUMBER: _ClassVar[int]
    TOP1_N_FIELD_NUMBER: _ClassVar[int]
    TOP1_LOGPROB_N_FIELD_NUMBER: _ClassVar[int]
    digest: str
    echo: _containers.RepeatedScalarFieldContainer[int]
    rows_B: Tensor
    cr_N_D: Tensor
    cr_scale_N: Tensor
    last_hidden_N_D: Tensor
    last_hidden_scale_N: Tensor
    logsumexp_N: Tensor
    top1_N: Tensor
    top1_logprob_N: Tensor
    def __init__(self, digest: _Optional[str] = ..., echo: _Optional[_Iterable[int]] = ..., rows_B: _Optional[_Union[Tensor, _Mapping]] = ..., cr_N_D: _Optional[_Union[Tensor, _Mapping]] = ..., cr_scale_N: _Optional[_Union[Tensor, _Mapping]] = ..., last_hidden_N_D: _Optional[_Union[Tensor, _Mapping]] = ..., last_hidden_scale_N: _Optional[_Union[Tensor, _Mapping]] = ..., logsumexp_N: _Optional[_Union[Tensor, _Mapping]] = ..., top1_N: _Optional[_Union[Tensor, _Mapping]] = ..., top1_logprob_N: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class DecodeCall(_message.Message):
    __slots__ = ("request_id", "request")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    request: DecodeRequest
    def __init__(self, request_id: _Optional[str] = ..., request: _Optional[_Union[DecodeRequest, _Mapping]] = ...) -> None: ...

class DecodePiece(_message.Message):
    __slots__ = ("request_id", "rows", "problem", "last", "timing", "quotas")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    QUOTAS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    rows: DecodeResponse
    problem: Problem
    last: bool
    timing: Timing
    quotas: Quotas
    def __init__(self, request_id: _Optional[str] = ..., rows: _Optional[_Union[DecodeResponse, _Mapping]] = ..., problem: _Optional[_Union[Problem, _Mapping]] = ..., last: _Optional[bool] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., quotas: _Optional[_Union[Quotas, _Mapping]] = ...) -> None: ...

class DistributionRequest(_message.Message):
    __slots__ = ("text", "token_ids", "template", "top_k")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: TokenIds
    template: str
    top_k: int
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., template: _Optional[str] = ..., top_k: _Optional[int] = ...) -> None: ...

class DistributionResponse(_message.Message):
    __slots__ = ("digest", "token_ids_K", "logprob_K", "tokens")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_K_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_K_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    digest: str
    token_ids_K: Tensor
    logprob_K: Tensor
    tokens: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, digest: _Optional[str] = ..., token_ids_K: _Optional[_Union[Tensor, _Mapping]] = ..., logprob_K: _Optional[_Union[Tensor, _Mapping]] = ..., tokens: _Optional[_Iterable[str]] = ...) -> None: ...

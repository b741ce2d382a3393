"""The OpenAPI page of every call: schemas, an example each, and the binary form.

Each constant holds the keyword arguments of one route.
"""

from __future__ import annotations

from typing import Any

from fastapi import Depends
from fastapi.security import HTTPBearer

from protocol.codec import BINARY, JSON, Message
from protocol.errors import (
    PROBLEM_JSON,
    Forbidden,
    InvalidRequest,
    Misdirected,
    NotAcceptable,
    NotReady,
    OverLimit,
    Overloaded,
    PayloadTooLarge,
    PemaError,
    RequestTimeout,
    ServerFault,
    Unauthenticated,
    UnsupportedMediaType,
    to_problem,
)
from protocol.messages import (
    DecodeRequest,
    DecodeResponse,
    DistributionRequest,
    DistributionResponse,
    EncodeRequest,
    EncodeResponse,
    HeadRequest,
    HeadRows,
    ModelCard,
    TokenizerBundle,
)

DESCRIPTION = f"""
Context representations, LM-head rows and next-token distributions of a language model (PEMA, arXiv 2311.08590).

**Two forms.** Bodies are `{BINARY}` or `{JSON}`; answers are binary unless `Accept: {JSON}` asks for JSON.
The binary form is a safetensors container: tensor fields are entries under their own name, ragged token ids are two
int32 entries (`token_ids.values`, `token_ids.lengths`), all other fields are a JSON object in the container's
`__metadata__` under the key `message`. An int64 entry `crc32` may give the CRC-32 of that object's text and of all
other entries' bytes in the order of their names.

**Keys.** Where the owner asks for one, every call but the probes wants `Authorization: Bearer <key>`.
A key allows the calls of its scopes; another is 403.

**Stateless.** Every call carries all that it needs; any call can be repeated.

**Errors** are `{PROBLEM_JSON}` (RFC 9457) with a `hint` that says what to do.
"""

# For the page's "Authorize" button alone: the admission controller checks the key, for both transports.
_SHOWN_KEY = Depends(HTTPBearer(auto_error=False, description="The owner's key, if one is asked for"))
# Errors of all calls, and of calls with a key, with a choice of forms or rows, with a body, with the model's work.
_ANY = (Misdirected, ServerFault)
_OF_KEYS = (Unauthenticated, Forbidden, NotReady)
_OF_CHOICES = (InvalidRequest, NotAcceptable, OverLimit)
_OF_BODIES = (RequestTimeout, PayloadTooLarge, UnsupportedMediaType)
_OF_THE_MODEL = (Overloaded,)
_PROBLEM_SCHEMA = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "hint", "request_id"],
    "properties": {
        "type": {"type": "string", "pattern": "^urn:pema:error:"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "what happened"},
        "hint": {"type": "string", "description": "what to do about it"},
        "retry_after_s": {"type": "number", "description": "seconds after which the call may succeed"},
        "request_id": {"type": "string", "description": "the id under which the server logged the call"},
    },
}


def _route(
    answer: type[Message] | None,
    answer_example: dict[str, Any],
    request: type[Message] | None = None,
    request_example: dict[str, Any] | None = None,
    *,
    description: str = "",
    tensors: bool = False,
    cached: bool = False,
    errors: tuple[type[PemaError], ...] = (),
) -> dict[str, Any]:
    content: dict[str, Any] = {JSON: {"example": answer_example}}
    if answer is not None:
        content[JSON]["schema"] = _schema(answer)
    if tensors:
        content[BINARY] = {"schema": {"type": "string", "format": "binary"}}
    responses: dict[int, Any] = {200: {"description": "Success", "content": content}}
    if cached:
        responses[304] = {"description": "It is what `If-None-Match` names."}
    route: dict[str, Any] = {"description": description, "responses": responses}
    if answer is not None:
        route["dependencies"] = [_SHOWN_KEY]
        errors += _OF_KEYS
    if request is not None:
        errors += _OF_CHOICES + _OF_BODIES
        body = {
            JSON: {"schema": _schema(request), "example": request_example},
            BINARY: {"schema": {"type": "string", "format": "binary"}},
        }
        route["openapi_extra"] = {"requestBody": {"required": True, "content": body}}
    responses |= {error.http_status: _problem(error) for error in errors + _ANY}
    return route


def _problem(error: type[PemaError]) -> dict[str, Any]:
    example = error("What happened.", hint="What to do about it.", request_id="5f0c2b")
    problem: dict[str, Any] = {
        "description": error.code.replace("-", " ").capitalize(),
        "content": {PROBLEM_JSON: {"schema": _PROBLEM_SCHEMA, "example": to_problem(example)}},
    }
    if error in (Overloaded, NotReady):
        problem["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
    return problem


def _schema(message: type[Message]) -> dict[str, Any]:
    schema = message.model_json_schema()
    definitions = schema.pop("$defs", {})
    return _inlined(schema, definitions)  # type: ignore[no-any-return]


def _inlined(node: Any, definitions: dict[str, Any]) -> Any:
    """The schema without `$ref`s, which would point outside their route."""
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inlined(definitions[node["$ref"].rsplit("/", 1)[1]], definitions)
    return {key: _inlined(value, definitions) for key, value in node.items()}


HEALTHZ = _route(None, {"status": "alive"})
READYZ = _route(
    None,
    {"status": "ready", "model": "gemma-3-270m"},
    description="503 until a real forward pass ran.",
    errors=(NotReady,),
)
MODEL = _route(
    ModelCard,
    {
        "name": "gemma-3-270m",
        "digest": "9d3c" * 16,
        "tokenizer_digest": "41be" * 16,
        "cr_kind": "last_hidden_state",
        "hidden_size": 640,
        "vocab_size": 262144,
        "dtype": "float32",
        "head_dtype": "float32",
        "head_digest": "7c0e" * 16,
        "head_policy": "full",
        "eos_token_ids": [1],
        "limits": {
            "max_sequence_tokens": 4096,
            "max_sequences": 512,
            "max_head_rows": 52428,
            "max_look_ahead": 1024,
            "max_rows": 52428,
            "max_body_bytes": 16777216,
        },
        "protocol_version": 1,
    },
)
TOKENIZER = _route(
    TokenizerBundle,
    {
        "tokenizer_json": "{…}",
        "chat_template": "{{ bos_token }}…",
        "special_tokens": {"bos_token": "<bos>"},
    },
    description="Answers 304 to a known `If-None-Match`.",
    cached=True,
)
LM_HEAD_RANGE = _route(
    HeadRows,
    {"digest": "9d3c" * 16, "vocab_size": 262144, "weight_N_D": [[0.01, -0.02], [0.03, 0.0]], "logit_scale": 1.0},
    description="The rows [start, stop). Has an ETag; answers 304 to a known `If-None-Match`.",
    tensors=True,
    cached=True,
    errors=_OF_CHOICES + _OF_THE_MODEL,
)
LM_HEAD = _route(
    HeadRows,
    {"digest": "9d3c" * 16, "vocab_size": 262144, "weight_N_D": [[0.01, -0.02], [0.03, 0.0]], "logit_scale": 1.0},
    HeadRequest,
    {"token_ids": [107, 9259], "dtype": "float32"},
    description="Chosen rows (`token_ids`), or a range (`start`, `stop`).",
    tensors=True,
    errors=_OF_THE_MODEL,
)
ENCODE = _route(
    EncodeResponse,
    {
        "digest": "9d3c" * 16,
        "echo": [3602296266],
        "rows_B": [2],
        "cr_N_D": [[0.5, -1.2], [0.1, 2.0]],
        "logsumexp_N": [17.2, 16.9],
    },
    EncodeRequest,
    {"token_ids": [[2, 9259, 1902]], "from_position": [1], "dtype": "float32", "with_logsumexp": True},
    tensors=True,
    errors=_OF_THE_MODEL,
)
DECODE = _route(
    DecodeResponse,
    {
        "digest": "9d3c" * 16,
        "echo": [3602296266],
        "rows_B": [2],
        "cr_N_D": [[0.5, -1.2], [0.1, 2.0]],
        "logsumexp_N": [17.2, 16.9],
        "top1_N": [236764, 564],
        "top1_logprob_N": [-1.4, -0.9],
    },
    DecodeRequest,
    {"token_ids": [[2, 9259, 1902]], "look_ahead": [1], "stop_token_ids": [107], "dtype": "float32"},
    description="With `look_ahead` 0 a plain step; with k > 0 the server drafts k tokens greedily from its own "
    "distribution.",
    tensors=True,
    errors=_OF_THE_MODEL,
)
DISTRIBUTION = _route(
    DistributionResponse,
    {"digest": "9d3c" * 16, "token_ids_K": [236764, 236888], "logprob_K": [-1.4, -1.7], "tokens": [",", "!"]},
    DistributionRequest,
    {"text": "Hello world", "top_k": 2},
    description="`token_ids` instead of `text` if you have them; `template: chat` wraps the text in the chat template; "
    "`top_k: 0` gives the whole distribution.",
    tensors=True,
    errors=_OF_THE_MODEL,
)

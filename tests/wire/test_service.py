"""Every call gives the same answer in-process, over HTTP in both forms and over gRPC; every mistake the same error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import Tensor

from data_owner_client.plm.connection.base import Connection
from harness.tiny_models import BOS, CHAT_TEMPLATE, VOCAB_SIZE, TinyModels, tiny_tokenizer
from plm_owner_server.engines.transformers.engine import load_model
from plm_owner_server.service.disclosure import Disclosure
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.service.requests import CallContext
from protocol import errors
from protocol.codec import BINARY, JSON, Message
from protocol.errors import PROBLEM_JSON, OverLimit, PemaError, from_problem
from protocol.integrity import token_crc32s
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
from tests import guard
from tests.support import make_service, random_ids, serve, serve_over_grpc

TRANSPORTS = ["in-process", "binary", "json", "grpc"]
# Path, request, answer and method of the service.
CALLS: dict[str, tuple[type[Message], type[Message], Callable[[PlmService, Any, CallContext], Message]]] = {
    "/v1/lm-head": (HeadRequest, HeadRows, PlmService.lm_head),
    "/v1/encode": (EncodeRequest, EncodeResponse, PlmService.encode),
    "/v1/decode": (DecodeRequest, DecodeResponse, PlmService.decode),
    "/v1/next-token-distribution": (DistributionRequest, DistributionResponse, PlmService.distribution),
}
A_RANGE = pytest.mark.unguarded("asks for a range of the head, which the policy candidate refuses")
SMALL: dict[str, Any] = {
    "max_sequence_tokens": 20,
    "max_sequences": 3,
    "max_answer_bytes": 50 * 32 * 4,  # 50 rows
    "max_look_ahead": 6,
    "max_body_bytes": 4096,
}


class Caller:
    """Makes a call over one transport; the fields of the request are given as JSON would have them."""

    def __init__(self, transport: str, service: PlmService, http: httpx.Client, grpc: Connection) -> None:
        self.transport = transport
        self._service = service
        self._http = http
        self._grpc = grpc

    def __call__(self, path: str, fields: dict[str, Any]) -> Any:
        request_type, answer_type, method = CALLS[path]
        body = json.dumps(fields).encode()
        if self.transport == "in-process":
            return method(self._service, request_type.from_json(body), guard.caller())
        if self.transport == "grpc":
            return getattr(self._grpc, method.__name__)(request_type.from_json(body))
        form = BINARY if self.transport == "binary" else JSON
        if form == BINARY:
            try:
                body = request_type.from_json(body).to_bytes()
            except PemaError:  # what no client of ours would send
                body = safetensors.torch.save({}, metadata={"message": json.dumps(fields)})
        response = self._http.post(path, content=body, headers={"Content-Type": form, "Accept": form})
        if response.status_code != 200:
            raise checked_problem(response)
        assert response.headers["content-type"] == form
        return answer_type.from_bytes(response.content) if form == BINARY else answer_type.from_json(response.content)


def checked_problem(response: httpx.Response) -> PemaError:
    """The error of an answer, after a look at everything that any problem document must have."""
    assert response.headers["content-type"] == PROBLEM_JSON
    problem = response.json()
    assert problem["status"] == response.status_code
    assert problem["detail"]
    assert problem["hint"]
    assert problem["request_id"] == response.headers["X-Request-Id"]
    error = from_problem(problem, response.status_code)
    assert error.http_status == response.status_code
    return error


@pytest.fixture(scope="module")
def http(tiny_server: str) -> Iterator[httpx.Client]:
    with guard.http(tiny_server) as client:
        yield client


@contextmanager
def connected(service: PlmService) -> Iterator[Connection]:
    with serve_over_grpc(service) as url:
        connection = guard.connection(url)
        yield connection
        connection.close()


@pytest.fixture(scope="module")
def grpc(tiny_service: PlmService) -> Iterator[Connection]:
    with connected(tiny_service) as connection:
        yield connection


@pytest.fixture(params=TRANSPORTS)
def call(request: pytest.FixtureRequest, tiny_service: PlmService, http: httpx.Client, grpc: Connection) -> Caller:
    return Caller(request.param, tiny_service, http, grpc)


@pytest.fixture(scope="module")
def small_service(tiny_models: TinyModels) -> PlmService:
    """A service with narrow limits and no chat template."""
    return make_service(tiny_models["qwen3"], **SMALL)


@pytest.fixture(scope="module")
def small_http(small_service: PlmService) -> Iterator[httpx.Client]:
    with serve(small_service) as url, guard.http(url) as client:
        yield client


@pytest.fixture(scope="module")
def small_grpc(small_service: PlmService) -> Iterator[Connection]:
    with connected(small_service) as connection:
        yield connection


@pytest.fixture(params=TRANSPORTS)
def small_call(
    request: pytest.FixtureRequest, small_service: PlmService, small_http: httpx.Client, small_grpc: Connection
) -> Caller:
    return Caller(request.param, small_service, small_http, small_grpc)


def assert_equal(ours: Message, theirs: Message) -> None:
    assert type(ours) is type(theirs)
    for name in type(ours).model_fields:
        left, right = getattr(ours, name), getattr(theirs, name)
        if isinstance(left, Tensor) and left.is_floating_point():
            torch.testing.assert_close(left.float(), right.float(), rtol=1e-5, atol=1e-5)
        elif isinstance(left, Tensor):
            assert left.tolist() == right.tolist()
        else:
            assert left == right, name


IDS = random_ids(1, [7, 30, 2])
GOOD = [
    ("/v1/lm-head", {"token_ids": [5, 0, 5, VOCAB_SIZE - 1], "dtype": "float32"}),
    pytest.param("/v1/lm-head", {"start": 3, "stop": 9, "dtype": "float16"}, marks=A_RANGE),
    pytest.param("/v1/lm-head", {"dtype": "bfloat16"}, marks=A_RANGE),
    ("/v1/lm-head", {"token_ids": [3, 4], "dtype": "bfloat16"}),
    ("/v1/encode", {"token_ids": IDS, "from_position": [0, 29, 1], "dtype": "float32", "with_logsumexp": True}),
    ("/v1/encode", {"token_ids": IDS[:1], "from_position": [3], "echo": token_crc32s(IDS[:1])}),
    ("/v1/decode", {"token_ids": IDS, "look_ahead": [4, 0, 2], "stop_token_ids": [2], "dtype": "float32"}),
    ("/v1/decode", {"token_ids": IDS, "look_ahead": [2, 0, 1], "from_position": [3, 29, 0], "dtype": "float32"}),
    ("/v1/decode", {"token_ids": IDS, "look_ahead": [0, 0, 0], "echo": token_crc32s(IDS), "dtype": "bfloat16"}),
    ("/v1/encode", {"token_ids": IDS, "from_position": [0, 0, 0], "dtype": "int8"}),
    ("/v1/decode", {"token_ids": IDS, "look_ahead": [1, 0, 3], "dtype": "int8"}),
    ("/v1/next-token-distribution", {"text": "Größe\n", "top_k": 3}),
    ("/v1/next-token-distribution", {"text": "Hallo", "template": "chat", "top_k": 10**12}),
    ("/v1/next-token-distribution", {"token_ids": IDS[0], "top_k": 0}),
]


@pytest.mark.parametrize(("path", "fields"), GOOD)
def test_answers_are_equal_over_every_transport(
    tiny_service: PlmService, http: httpx.Client, grpc: Connection, path: str, fields: dict[str, Any]
) -> None:
    # Once before: from known prefixes on, the same sums may be taken in another order.
    CALLS[path][2](tiny_service, CALLS[path][0].from_json(json.dumps(fields).encode()), guard.caller())
    answers = [Caller(transport, tiny_service, http, grpc)(path, fields) for transport in TRANSPORTS]
    ours, binary, as_json, over_grpc = answers
    assert_equal(as_json, ours)
    assert over_grpc.to_bytes() == binary.to_bytes() == ours.to_bytes()
    if "dtype" in fields:
        tensor = binary.weight_N_D if path == "/v1/lm-head" else binary.cr_N_D
        assert str(tensor.dtype) == f"torch.{fields['dtype']}"
    assert ours.digest == tiny_service.model_card(guard.caller()).digest


def test_the_model_card_is_the_models(tiny_service: PlmService, http: httpx.Client, grpc: Connection) -> None:
    card = ModelCard.from_json(http.get("/v1/model").content)
    assert card == tiny_service.model_card(guard.caller()) == grpc.model_card()
    assert (card.name, card.hidden_size, card.vocab_size, card.dtype) == ("llama", 32, VOCAB_SIZE, "float32")
    assert (card.cr_kind, card.eos_token_ids) == ("last_hidden_state", [2])
    assert Disclosure(card.head_policy, card.rotated) == guard.caller().disclosure
    assert card.limits.max_sequence_tokens == 128  # the model's own limit is under the setting


@pytest.mark.transformers_only(reason="only it gives feed-forward outputs")
def test_identity_tells_models_and_kinds_of_representation_apart(tiny_models: TinyModels) -> None:
    cards = [
        make_service(tiny_models["llama"]).model_card(),
        make_service(tiny_models["llama"], cr_kind="ffn_output").model_card(),
        make_service(tiny_models["qwen3"]).model_card(),
    ]
    assert len({card.digest for card in cards}) == 3
    assert make_service(tiny_models["llama"], max_sequences=2).model_card().digest == cards[0].digest


def test_the_tokenizer_travels_whole(tiny_service: PlmService, http: httpx.Client, grpc: Connection) -> None:
    bundle = TokenizerBundle.from_json(http.get("/v1/tokenizer").content)
    assert bundle == tiny_service.tokenizer() == grpc.tokenizer()
    assert bundle.digest == tiny_service.model_card().tokenizer_digest
    text = "Die Größe\nof the thing 🙂"
    tokenizer = Tokenizer.from_str(bundle.tokenizer_json)
    assert tokenizer.encode(text).ids == tiny_tokenizer()(text).input_ids
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert bundle.chat_template == CHAT_TEMPLATE
    assert bundle.special_tokens == {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}


@pytest.mark.parametrize("architecture", ["llama", "phi", "gemma2", "granite"])
def test_head_rows_are_the_models_own(architecture: str, tiny_models: TinyModels) -> None:
    service = make_service(tiny_models[architecture])
    head = load_model(tiny_models[architecture], device="cpu", dtype="float32").get_output_embeddings()
    ids = [7, 3, 7]
    for fields, rows in (({"token_ids": ids}, ids), ({"start": 4, "stop": 6}, [4, 5]), ({}, list(range(VOCAB_SIZE)))):
        answer = service.lm_head(HeadRequest(**fields, dtype="float32"))
        assert torch.equal(answer.weight_N_D, head.weight[rows])
        assert (answer.bias_N is not None) == (architecture == "phi")
        if answer.bias_N is not None:
            assert torch.equal(answer.bias_N, head.bias[rows])
        assert answer.vocab_size == VOCAB_SIZE


def test_chat_text_goes_through_the_models_template(call: Caller) -> None:
    by_hand = tiny_tokenizer()("<bos>[user] Hallo\n[assistant] ", add_special_tokens=False).input_ids
    assert by_hand[:2] != [1, 1]
    chat = call("/v1/next-token-distribution", {"text": "Hallo", "template": "chat"})
    assert_equal(chat, call("/v1/next-token-distribution", {"token_ids": by_hand}))
    plain = call("/v1/next-token-distribution", {"text": "Hallo"})
    assert_equal(plain, call("/v1/next-token-distribution", {"token_ids": tiny_tokenizer()("Hallo").input_ids}))
    assert plain.tokens == [tiny_tokenizer().decode([i]) for i in plain.token_ids_K.tolist()]


def test_a_text_that_spells_special_tokens_is_text(call: Caller) -> None:
    pieces = ["<bos", ">a<", "eos>"]  # of which none is a special token
    by_hand = [i for piece in pieces for i in tiny_tokenizer()(piece, add_special_tokens=False).input_ids]
    plain = call("/v1/next-token-distribution", {"text": "".join(pieces)})
    assert_equal(plain, call("/v1/next-token-distribution", {"token_ids": [BOS, *by_hand]}))
    before, after = (
        tiny_tokenizer()(part, add_special_tokens=False).input_ids for part in ("[user] ", "\n[assistant] ")
    )
    chat = call("/v1/next-token-distribution", {"text": "".join(pieces), "template": "chat"})
    assert_equal(chat, call("/v1/next-token-distribution", {"token_ids": [BOS, *before, *by_hand, *after]}))


def encode(**changed: Any) -> dict[str, Any]:
    return {"token_ids": [[5, 6]], "from_position": [0]} | changed


def decode(**changed: Any) -> dict[str, Any]:
    return {"token_ids": [[5, 6]], "look_ahead": [1]} | changed


INVALID, OVER, UNSUPPORTED = errors.InvalidRequest, errors.OverLimit, errors.Unsupported
ENCODE, DECODE, HEAD, DISTRIBUTION = "/v1/encode", "/v1/decode", "/v1/lm-head", "/v1/next-token-distribution"
BAD: dict[str, tuple[str, dict[str, Any], type[PemaError]]] = {
    "empty batch": (ENCODE, encode(token_ids=[], from_position=[]), OVER),
    "empty batch to decode": (DECODE, decode(token_ids=[], look_ahead=[]), OVER),
    "too many sequences": (ENCODE, encode(token_ids=[[5]] * 4, from_position=[0] * 4), OVER),
    "empty sequence": (ENCODE, encode(token_ids=[[5], []], from_position=[0, 0]), INVALID),
    "empty prefix": (DECODE, decode(token_ids=[[]]), INVALID),
    "over-long sequence": (ENCODE, encode(token_ids=[[5] * 21]), OVER),
    "over-long prefix": (DECODE, decode(token_ids=[[5] * 21], look_ahead=[0]), OVER),
    "over-long with drafts": (DECODE, decode(token_ids=[[5] * 18], look_ahead=[3]), OVER),
    "id outside the vocabulary": (ENCODE, encode(token_ids=[[5, VOCAB_SIZE]]), INVALID),
    "id of int32's end": (DECODE, decode(token_ids=[[5, 2**31 - 1]]), INVALID),
    "id beyond int32": (DECODE, decode(token_ids=[[5, 2**31]]), INVALID),
    "negative id": (ENCODE, encode(token_ids=[[5, -1]]), INVALID),
    "id is text": (ENCODE, encode(token_ids=[["5"]]), INVALID),
    "stop id outside the vocabulary": (DECODE, decode(stop_token_ids=[VOCAB_SIZE]), INVALID),
    "from_position at the end": (ENCODE, encode(from_position=[2]), INVALID),
    "from_position negative": (ENCODE, encode(from_position=[-1]), INVALID),
    "from_position enormous": (ENCODE, encode(from_position=[10**30]), INVALID),
    "from_position too many": (ENCODE, encode(from_position=[0, 0]), INVALID),
    "from_position missing": (ENCODE, {"token_ids": [[5]]}, INVALID),
    "look_ahead too large": (DECODE, decode(look_ahead=[7]), OVER),
    "look_ahead negative": (DECODE, decode(look_ahead=[-1]), OVER),
    "look_ahead too few": (DECODE, decode(look_ahead=[]), INVALID),
    "wrong echo": (ENCODE, encode(echo=[12345]), INVALID),
    "wrong echo to decode": (DECODE, decode(echo=token_crc32s([[6, 5]])), INVALID),
    "echo too many": (ENCODE, encode(echo=token_crc32s([[5, 6], [5, 6]])), INVALID),
    "unknown dtype": (ENCODE, encode(dtype="int4"), INVALID),
    "unknown field": (DECODE, decode(temperature=1.0), INVALID),
    "neither text nor ids": (DISTRIBUTION, {}, INVALID),
    "both text and ids": (DISTRIBUTION, {"text": "a", "token_ids": [5]}, INVALID),
    "unknown template": (DISTRIBUTION, {"text": "a", "template": "alpaca"}, UNSUPPORTED),
    "no chat template": (DISTRIBUTION, {"text": "a", "template": "chat"}, UNSUPPORTED),
    "template with ids": (DISTRIBUTION, {"token_ids": [5], "template": "alpaca"}, UNSUPPORTED),
    "no ids at all": (DISTRIBUTION, {"token_ids": []}, INVALID),
    "text too long": (DISTRIBUTION, {"text": "x" * 100}, OVER),
    "lone surrogate": (DISTRIBUTION, {"text": "\ud800"}, INVALID),
    "top_k negative": (DISTRIBUTION, {"text": "a", "top_k": -1}, INVALID),
    "distribution of an id outside": (DISTRIBUTION, {"token_ids": [VOCAB_SIZE]}, INVALID),
    "head range reversed": (HEAD, {"start": 9, "stop": 3}, INVALID),
    "head range empty": (HEAD, {"start": 9, "stop": 9}, INVALID),
    "head range beyond": (HEAD, {"start": 270, "stop": VOCAB_SIZE + 1}, INVALID),
    "head range enormous": (HEAD, {"start": 10**30}, INVALID),
    "head range negative": (HEAD, {"start": -3, "stop": 3}, INVALID),
    "too many head rows": (HEAD, {"start": 0, "stop": 51}, OVER),
    "all head rows": (HEAD, {}, OVER),
    "too many chosen head rows": (HEAD, {"token_ids": [1] * 51}, OVER),
    "no chosen head rows": (HEAD, {"token_ids": []}, OVER),
    "head id outside the vocabulary": (HEAD, {"token_ids": [VOCAB_SIZE]}, INVALID),
    "head range and ids": (HEAD, {"token_ids": [1], "stop": 3}, INVALID),
}
RANGES = [name for name, (path, fields, _) in BAD.items() if path == HEAD and "token_ids" not in fields]


@pytest.mark.parametrize("name", [pytest.param(name, marks=A_RANGE) if name in RANGES else name for name in BAD])
def test_a_mistake_is_the_same_error_over_every_transport(small_call: Caller, name: str) -> None:
    path, fields, error_type = BAD[name]
    with pytest.raises(PemaError) as caught:
        small_call(path, fields)
    assert type(caught.value) is error_type
    assert caught.value.detail
    assert caught.value.hint


@pytest.mark.parametrize(
    ("path", "fields", "rows"),
    [
        (ENCODE, encode(token_ids=[[5] * 20] * 3, from_position=[19, 0, 5]), 1 + 20 + 15),
        (DECODE, decode(token_ids=[[5] * 14, [VOCAB_SIZE - 1]], look_ahead=[6, 6]), 14),
        pytest.param(HEAD, {"start": VOCAB_SIZE - 50}, 50, marks=A_RANGE),
        (HEAD, {"token_ids": [VOCAB_SIZE - 1] * 50}, 50),
    ],
)
def test_what_is_just_within_the_limits_is_answered(
    small_call: Caller, path: str, fields: dict[str, Any], rows: int
) -> None:
    answer = small_call(path, fields)
    assert len(answer.weight_N_D if path == HEAD else answer.cr_N_D) == rows


def test_the_rows_of_an_answer_are_bounded(tiny_models: TinyModels) -> None:
    service = make_service(tiny_models["llama"], max_answer_bytes=5 * 32 * 4)
    assert len(service.encode(EncodeRequest(token_ids=[[5, 6, 7], [8, 9]], from_position=[0, 0])).cr_N_D) == 5
    with pytest.raises(OverLimit, match="6 rows"):
        service.encode(EncodeRequest(token_ids=[[5, 6, 7], [8, 9, 5]], from_position=[0, 0]))
    with pytest.raises(OverLimit, match="6 rows"):
        service.decode(DecodeRequest(token_ids=[[5, 6, 7], [8, 9, 5]], look_ahead=[2, 2]))

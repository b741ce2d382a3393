"""The calls of the protocol, in one table for both transports."""

from __future__ import annotations

from dataclasses import dataclass

from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.service.requests import CallContext
from plm_owner_server.tenants.scopes import Scope
from protocol.codec import Message
from protocol.messages import DecodeRequest, DistributionRequest, EncodeRequest, HeadRequest


@dataclass(frozen=True)
class Call:
    """A call of the protocol.

    Attributes:
        name: name in the log, the metrics and the traces.
        path: path over HTTP.
        rpc: name over gRPC.
        scope: scope that a tenant needs for it.
    """

    name: str
    path: str
    rpc: str
    scope: Scope


@dataclass(frozen=True)
class RequestCall(Call):
    """A call with a request message.

    Attributes:
        request: type of the request.
        method: name of the service's method that answers it.
    """

    request: type[Message]
    method: str

    def answer(self, service: PlmService, request: Message, context: CallContext) -> Message:
        """The service's answer to a request."""
        answer: Message = getattr(service, self.method)(request, context)
        return answer


CARD = Call("card", "/v1/model", "GetModelCard", "card")
TOKENIZER = Call("tokenizer", "/v1/tokenizer", "GetTokenizer", "card")
HEAD = RequestCall("head", "/v1/lm-head", "GetLmHead", "head", HeadRequest, "lm_head")
ENCODE = RequestCall("encode", "/v1/encode", "Encode", "encode", EncodeRequest, "encode")
DECODE = RequestCall("decode", "/v1/decode", "Decode", "decode", DecodeRequest, "decode")
DISTRIBUTION = RequestCall(
    "distribution",
    "/v1/next-token-distribution",
    "GetNextTokenDistribution",
    "distribution",
    DistributionRequest,
    "distribution",
)
CALLS: tuple[Call, ...] = (CARD, TOKENIZER, HEAD, ENCODE, DECODE, DISTRIBUTION)

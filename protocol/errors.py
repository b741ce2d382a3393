"""Tree of errors that both sides raise, with its mapping to HTTP problem+json and gRPC status.

    PemaError
    ├── InvalidRequest (ValueError)         400  the request is wrong; the detail says what to change
    │   ├── MalformedMessage                400  the body does not match its content type
    │   ├── UnsupportedMediaType            415  the body is compressed, which no call accepts
    │   ├── OverLimit                       422  longer, larger or more than the model card allows
    │   └── Unsupported                     422  this model or server does not have the feature
    ├── Unauthenticated (PermissionError)   401  the key or certificate is missing, or belongs to no active tenant
    ├── Forbidden (PermissionError)         403  the key is valid, but does not allow this call
    │   └── BudgetExhausted                 403  a lifetime budget of the tenant is used up
    ├── Misdirected (PermissionError)       421  the request names a host that the server does not answer
    ├── PayloadTooLarge (ValueError)        413  the body is over the server's byte limit
    ├── RequestTimeout (TimeoutError)       408  the client sends its request, or reads its answer, too slowly
    ├── NotAcceptable (ValueError)          406  no representation of the answer suits the Accept header
    ├── Overloaded                          429  the server is busy; try again after `retry_after_s`
    │   └── QuotaExceeded                   429  the tenant's quota is used up; try again after `retry_after_s`
    ├── NotReady                            503  the server is starting or stopping; try again after `retry_after_s`
    ├── ServerFault                         500  the server failed; carries none of the caller's data
    ├── NumericalFault (ArithmeticError)    422  values are not finite in the requested dtype; carries counts
    ├── ConnectionFailed (ConnectionError)       the server was not reached, or disconnected (client only)
    │   ├── AnswerLost                           the connection was cut before the whole answer was there
    │   ├── TimedOut (TimeoutError)              the answer took longer than the client or a gateway waits
    │   └── GatewayFailed                        something in front of the server answered in its place
    │       └── GatewayTimeout (TimedOut)        as it took the server too long
    ├── Untrusted (ConnectionError)              the server's certificate is not trusted (client only)
    ├── ProtocolViolation                        the answer breaks the protocol (client only)
    ├── IdentityMismatch (ValueError)            files and server belong to different models (client only)
    └── InvalidData (ValueError)                 a file of the user is not usable (client only)

Every error has a `hint` that says what to do. Errors never carry text, token ids or representations.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from protocol.printable import printable_line

PROBLEM_JSON = "application/problem+json"
_TYPE_PREFIX = "urn:pema:error:"


class PemaError(Exception):
    """Base of all errors of this project.

    Args:
        detail: one sentence that says what happened.
        hint: one sentence that says what to do.
        retry_after_s: seconds after which the same call may succeed; None if unknown.
        request_id: id under which both sides logged the call; None if there is none.
    """

    code: ClassVar[str] = "error"
    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        detail: str,
        *,
        hint: str = "",
        retry_after_s: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.hint = hint
        self.retry_after_s = retry_after_s
        self.request_id = request_id

    def __str__(self) -> str:
        text = f"{self.detail} {self.hint}".rstrip()
        return f"{text} [request {self.request_id}]" if self.request_id else text


class InvalidRequest(PemaError, ValueError):
    code = "invalid-request"
    http_status = 400
    grpc_status = "INVALID_ARGUMENT"


class MalformedMessage(InvalidRequest):
    code = "malformed-message"


class UnsupportedMediaType(InvalidRequest):
    code = "unknown-encoding"
    http_status = 415


class OverLimit(InvalidRequest):
    code = "over-limit"
    http_status = 422
    grpc_status = "OUT_OF_RANGE"


class Unsupported(InvalidRequest):
    code = "unsupported"
    http_status = 422
    grpc_status = "UNIMPLEMENTED"


class Unauthenticated(PemaError, PermissionError):
    code = "unauthenticated"
    http_status = 401
    grpc_status = "UNAUTHENTICATED"


class Forbidden(PemaError, PermissionError):
    code = "forbidden"
    http_status = 403
    grpc_status = "PERMISSION_DENIED"


class BudgetExhausted(Forbidden):
    code = "budget-spent"


class Misdirected(PemaError, PermissionError):
    code = "misdirected"
    http_status = 421
    grpc_status = "PERMISSION_DENIED"


class PayloadTooLarge(PemaError, ValueError):
    code = "payload-too-large"
    http_status = 413
    grpc_status = "OUT_OF_RANGE"


class RequestTimeout(PemaError, TimeoutError):
    code = "too-slow"
    http_status = 408
    grpc_status = "DEADLINE_EXCEEDED"


class NotAcceptable(PemaError, ValueError):
    code = "not-acceptable"
    http_status = 406


class Overloaded(PemaError):
    code = "overloaded"
    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"


class QuotaExceeded(Overloaded):
    code = "quota-exceeded"


class NotReady(PemaError):
    code = "not-ready"
    http_status = 503
    grpc_status = "UNAVAILABLE"


class ServerFault(PemaError):
    code = "server-fault"


class NumericalFault(PemaError, ArithmeticError):
    code = "numerical-fault"
    http_status = 422
    grpc_status = "OUT_OF_RANGE"


class ConnectionFailed(PemaError, ConnectionError):
    code = "connection-failed"


class AnswerLost(ConnectionFailed):
    code = "answer-lost"


class TimedOut(ConnectionFailed, TimeoutError):
    code = "timed-out"


class GatewayFailed(ConnectionFailed):
    code = "gateway-failed"
    http_status = 502


class GatewayTimeout(GatewayFailed, TimedOut):
    code = "gateway-timeout"
    http_status = 504


class Untrusted(PemaError, ConnectionError):
    code = "untrusted"


class ProtocolViolation(PemaError):
    code = "protocol-violation"


class IdentityMismatch(PemaError, ValueError):
    code = "identity-mismatch"


class InvalidData(PemaError, ValueError):
    code = "invalid-data"


def to_problem(error: PemaError) -> dict[str, Any]:
    """The error as an RFC 9457 problem document."""
    problem: dict[str, Any] = {
        "type": _TYPE_PREFIX + error.code,
        "title": error.code.replace("-", " ").capitalize(),
        "status": error.http_status,
        "detail": error.detail,
        "hint": error.hint,
    }
    if error.retry_after_s is not None:
        problem["retry_after_s"] = error.retry_after_s
    if error.request_id is not None:
        problem["request_id"] = error.request_id
    return problem


def is_problem(document: object) -> bool:
    """True if a parsed document is a problem of this protocol, and not of a gateway."""
    return isinstance(document, dict) and str(document.get("type", "")).startswith(_TYPE_PREFIX)


def from_problem(problem: object, status: int, request_id: str | None = None) -> PemaError:
    """The error that a problem document describes. An unknown type becomes the base class of its status.

    Args:
        problem: the parsed document. It comes from the other side, so every field is checked.
        status: the HTTP status beside it.
        request_id: id of the error if the document has none.
    """
    fields = problem if isinstance(problem, dict) else {}
    code = str(fields.get("type", "")).removeprefix(_TYPE_PREFIX)
    cls = _BY_CODE.get(code) or (InvalidRequest if 400 <= status < 500 else ServerFault)
    retry_after_s = fields.get("retry_after_s")
    if not isinstance(retry_after_s, (int, float)) or not math.isfinite(retry_after_s) or retry_after_s < 0:
        retry_after_s = None
    return cls(
        printable_line(fields.get("detail") or fields.get("title") or f"the server answered HTTP {status}"),
        hint=printable_line(fields.get("hint") or ""),
        retry_after_s=retry_after_s,
        request_id=printable_line(fields.get("request_id") or "") or request_id,
    )


def _tree(cls: type[PemaError]) -> list[type[PemaError]]:
    return [cls, *(node for child in cls.__subclasses__() for node in _tree(child))]


_BY_CODE = {cls.code: cls for cls in _tree(PemaError)}

"""A gateway whose answers are scripts, which serves the real page. Tests release its chunks one by one."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from data_owner_client.gateway.request_log import CONTENT_SECURITY_POLICY
from data_owner_client.gateway.routes.page import page_router

PLM, ADAPTER = "plm", "german"
KEY = "the key of the tests"
PIECES = [
    b"Das",
    b" Haus",
    b" <img src=x onerror=\"document.title='owned'\">",
    b" \xf0\x9f",
    b"\x8f\xa0",
    b"\n",
    b"gut.",
]
PLM_PIECES = [b"Das", b" Geb\xc3\xa4ude", b" ist", b" gut."]
DECIDED = ["both", "adapter", "neither", "plm", "both", "adapter", "neither"]
SHOWN = {
    "tokens": 1234,
    "round_trips": 7,
    "sent_bytes": 4321,
    "received_bytes": 98765,
    "quota": [{"name": "day", "quota": 9000, "left": 5000, "unit": "tokens", "window_s": 86400, "resets_s": 60}],
}
FACTS = {
    "name": ADAPTER,
    "context_mode": "private",
    "interpolation": {"schedule": "gradual", "lambda_max": 0.8},
    "memory": {"pairs": 900, "rows": 12345},
    "history": [
        {"epoch": 1, "phase": "joint", "loss": 3.0, "validation_nll": 2.5},
        {"epoch": 2, "phase": "joint", "loss": 2.0, "validation_nll": 2.0},
    ],
    "trials": [{"settings": {"rank": 8}, "nll": 2.0}, {"settings": {"rank": 16}, "nll": 1.9}],
    "trial_weights": [0, 1],
    "exchange": {"source_bytes": 1000, "head_rows": None},
}


def _top(first: bytes, second: str) -> list[dict[str, Any]]:
    listed = [
        {"id": _id(first), "text": first.decode(errors="replace"), "bytes": list(first), "logprob": math.log(0.6)}
    ]
    listed += [{"id": 900 + len(second), "text": second, "bytes": list(second.encode()), "logprob": math.log(0.25)}]
    return [*listed, {"id": 999, "text": "never", "bytes": list(b"never"), "logprob": -9999.0}]


def _id(piece: bytes) -> int:
    return 1 + sorted({*PIECES, *PLM_PIECES}).index(piece)


def tokens(pieces: list[bytes], *, alone: bool) -> list[dict[str, Any]]:
    """The explained tokens of an answer."""
    return [
        {
            "id": _id(piece),
            "text": piece.decode(errors="replace"),
            "bytes": list(piece),
            "lambda": 0.0 if alone else 0.8 - 0.1 * place,
            "share": 0.0 if alone else 0.9 - 0.1 * place,
            "decided_by": "plm" if alone else DECIDED[place],
            "logprob": math.log(0.6),
            "plm_logprob": math.log(0.6),
            "pema_logprob": None if alone else math.log(0.6),
            "plm_top": _top(piece, " Heim"),
            "pema_top": [] if alone else _top(piece, " Heimat"),
            "mixture_top": _top(piece, " Heim"),
            "unlisted": 0.03,
        }
        for place, piece in enumerate(pieces)
    ]


@dataclass
class ScriptedGateway:
    """Answers by script.

    Attributes:
        wants_key: calls without `KEY` are refused.
        gated: chunks wait for `release`.
        released: chunks that each stream may have sent.
        requests: bodies of all chat requests.
        aborted: number of streams whose client hung up.
    """

    wants_key: bool = False
    gated: bool = False
    released: int = 0
    requests: list[dict[str, Any]] = field(default_factory=list)
    aborted: int = 0

    def app(self) -> FastAPI:
        """The application: the page of the real gateway, and answers of this script."""
        app = FastAPI()
        app.include_router(page_router())

        @app.middleware("http")
        async def with_policy(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
            response = await call_next(request)
            response.headers["content-security-policy"] = CONTENT_SECURITY_POLICY
            return response

        @app.get("/v1/models", response_model=None)
        async def models(request: Request) -> Any:
            if self.wants_key and request.headers.get("authorization") != f"Bearer {KEY}":
                return JSONResponse({"error": {"message": "The key is missing.", "param": None}}, 401)
            return {"object": "list", "data": [{"id": PLM}, {"id": ADAPTER, "parent": PLM}]}

        @app.get("/pema/adapters/{name}")
        async def facts(name: str) -> Any:
            return FACTS

        @app.post("/v1/chat/completions", response_model=None)
        async def chat(request: Request) -> Any:
            body = json.loads(await request.body())
            self.requests.append(body)
            if body["messages"][0]["content"] == "too long":
                error = {"message": "The text is too long.", "param": "messages", "code": "context_length_exceeded"}
                return JSONResponse({"error": error}, 400)
            return StreamingResponse(self._events(body), media_type="text/event-stream")

        return app

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        alone = body["pema"].get("schedule") == "none"
        pieces = PLM_PIECES if alone else PIECES
        begun = len(body["pema"].get("prefix", []))
        pending, done = b"", 0
        try:
            for number, token in enumerate(tokens(pieces, alone=alone)[begun:]):
                while self.gated and self.released <= number:
                    await asyncio.sleep(0.01)
                pending += bytes(token["bytes"])
                text, pending = _whole(pending)
                yield _event({"delta": {"content": text}, "pema": {"tokens": [token]}})
                done += 1
            yield _event({"delta": {}, "finish_reason": "stop"}, {"pema": {"shown": SHOWN}})
            yield "data: [DONE]\n\n"
            done = -1
        finally:
            self.aborted += done >= 0


def _whole(pending: bytes) -> tuple[str, bytes]:
    try:
        return pending.decode(), b""
    except UnicodeDecodeError as error:
        return pending[: error.start].decode(), pending[error.start :]


def _event(choice: dict[str, Any], top: dict[str, Any] | None = None) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, **choice}], **(top or {})})}\n\n"

"""What every transport offers: the calls, and an account of each exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from protocol.errors import Untrusted
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
from protocol.rate_limits import RateLimitStatus
from protocol.timing import ServerTiming


class PlmApi(Protocol):
    """The calls of the wire. All are stateless and may be repeated; the server's own service has this shape, too.

    Every call raises `PemaError`: the server's own errors, or `ConnectionFailed` if there was no answer.
    """

    def model_card(self) -> ModelCard:
        """Who the model is."""

    def tokenizer(self) -> TokenizerBundle:
        """The model's tokenizer."""

    def lm_head(self, request: HeadRequest) -> HeadRows:
        """Rows of the LM head."""

    def encode(self, request: EncodeRequest) -> EncodeResponse:
        """Context representations of given sequences."""

    def decode(self, request: DecodeRequest) -> DecodeResponse:
        """The newest position of every prefix and drafted ones."""

    def distribution(self, request: DistributionRequest) -> DistributionResponse:
        """The next-token distribution."""


@dataclass(frozen=True)
class Attempt:
    """One attempt of a call that the server answered, be it with a refusal because it had too much to do.

    Attributes:
        call: its name.
        request_id: under which both sides logged it.
        seconds: from sending the request to having read the answer.
        refused: whether it was turned away.
        timing: where the server says that the time went, if it does.
    """

    call: str
    request_id: str
    seconds: float
    refused: bool = False
    timing: ServerTiming | None = None


Observer = Callable[[Attempt], None]


class Connection(PlmApi, Protocol):
    """A way to a PLM; thread-safe.

    Attributes:
        observers: told of every exchange, in the thread that made the call.
        rate_limits: what the newest answer said is left of the client's quotas; empty where there are none.
    """

    observers: list[Observer]
    rate_limits: tuple[RateLimitStatus, ...]

    def close(self) -> None:
        """Let go of sockets and the like."""


def untrusted_error(url: str, reason: str, request_id: str) -> Untrusted:
    """The error for a server that cannot prove that it is the one of this address."""
    return Untrusted(
        f"The certificate of {url} cannot be trusted: {reason}.",
        hint="If the owner gave you the file of the authority that signed it, say --ca FILE.",
        request_id=request_id,
    )


def unreachable_hint(url: str, *, slow: bool) -> str:
    """What to do when nobody answers."""
    if slow:
        return "The server is too slow or hangs; ask its owner."
    hint = "Is the address right and the server running? It starts with: pema-server serve"
    if url.startswith(("https://", "grpcs://")):
        # Who shows none, or one of another authority, is hung up on without a word.
        hint += ". If the owner asks for a certificate of yours, say --client-certificate and --client-key."
    return hint

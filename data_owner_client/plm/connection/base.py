"""Interfaces of all transports: the calls, and the record of each attempt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

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
    """The calls of the protocol. All are stateless and may be repeated. The server's `PlmService` has them, too.

    Every call raises `PemaError`: the server's errors, or `ConnectionFailed` if there was no answer.
    """

    def model_card(self) -> ModelCard:
        """Identity, limits and policies of the model."""

    def tokenizer(self) -> TokenizerBundle:
        """The model's tokenizer."""

    def lm_head(self, request: HeadRequest) -> HeadRows:
        """Rows of the LM head."""

    def encode(self, request: EncodeRequest) -> EncodeResponse:
        """Context representations of sequences."""

    def decode(self, request: DecodeRequest) -> DecodeResponse:
        """Representations of the newest position of every prefix, and of drafted positions."""

    def distribution(self, request: DistributionRequest) -> DistributionResponse:
        """The next-token distribution."""


@dataclass(frozen=True)
class Attempt:
    """One attempt of a call that was answered, or that was refused or took too long.

    Attributes:
        call: name of the call.
        request_id: id of the request in the logs of client and server.
        seconds: time from sending the request to the end of the answer.
        refused: whether the server was overloaded and refused the call, or the answer took too long.
        timing: the server's split of its time; None if it sent none.
    """

    call: str
    request_id: str
    seconds: float
    refused: bool = False
    timing: ServerTiming | None = None


Observer = Callable[[Attempt], None]


class Connection(PlmApi, Protocol):
    """A connection to a PLM; thread-safe.

    Attributes:
        observers: functions that receive every attempt, in the thread that made the call.
        rate_limits: the client's remaining quotas, as of the newest answer; empty if there are none.
    """

    observers: list[Observer]
    rate_limits: tuple[RateLimitStatus, ...]

    def close(self) -> None:
        """Release sockets and other resources."""

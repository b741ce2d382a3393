"""The calls that every transport offers."""

from __future__ import annotations

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


class Connection(Protocol):
    """A way to a PLM. All calls are stateless and may be repeated; the server's own service has this shape, too.

    Every call raises `PemaError`: the server's own errors, or `ConnectionFailed` if there was no answer.
    """

    def close(self) -> None:
        """Let go of sockets and the like."""

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

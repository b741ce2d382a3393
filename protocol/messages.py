"""Requests and answers of the wire. Shapes: B sequences, N rows in all, D hidden size, V vocabulary, K tokens.

Rows of several sequences are concatenated in the order of the sequences. `rows_B` is the number of rows of each.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Annotated

import torch
from pydantic import Field

from protocol import PROTOCOL_VERSION
from protocol.codec import FloatMatrix, FloatTensor, IntTensor, Message, RaggedIds, RowMatrix, Text, TokenId
from protocol.head import LMHead
from protocol.types import CrKind, HeadDtype, HeadPolicy, WireDtype

DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
}


Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""SHA-256 in hexadecimal. Clients name files by it, so no other text is accepted."""


class Limits(Message):
    """Limits of one request."""

    max_sequence_tokens: int = Field(ge=1, description="longest sequence, drafted tokens included, in tokens")
    max_sequences: int = Field(ge=1, description="most sequences in one request")
    max_head_rows: int = Field(ge=1, description="most head rows in one answer; request more in several calls")
    max_look_ahead: int = Field(ge=0, description="most tokens drafted for a sequence in one request")
    max_rows: int = Field(ge=1, description="most representations in one answer")
    max_body_bytes: int = Field(ge=1, description="largest request body, in bytes")


class ModelCard(Message):
    """Identity, shapes and limits of the model that is served."""

    name: str
    digest: Digest = Field(
        description="digest over weights, tokenizer, kind of CR, head policy and rotation; stamped into memories and "
        "adapters"
    )
    tokenizer_digest: Digest
    cr_kind: CrKind
    hidden_size: int = Field(ge=1, description="D")
    vocab_size: int = Field(ge=1, description="V, the number of rows of the LM head")
    dtype: str = Field(description="dtype that the model computes in")
    head_dtype: HeadDtype = Field(description="dtype of the LM head's weight")
    head_digest: Digest = Field(
        description="SHA-256 over the LM head's rows in head_dtype, its bias if it has one, then its scale and soft-cap"
    )
    head_policy: HeadPolicy = Field(
        default="full", description="rows of the LM head that a client may have: all, those of chosen tokens, or none"
    )
    eos_token_ids: list[int] = Field(description="tokens after which the model itself would stop")
    limits: Limits
    protocol_version: int = PROTOCOL_VERSION
    rotated: bool = Field(
        default=False,
        description="whether representations and LM head rows are in the tenant's secret basis; head_digest then "
        "identifies the head, but is not computed from its rows",
    )
    head_bias: bool = Field(default=False, description="whether the LM head has a bias")
    softcap: float | None = Field(
        default=None,
        gt=0,
        description="soft-cap on the logits; needed to recover head rows from distributions",
    )
    # Not sent where there are none: older clients do not know the field.
    scopes: list[str] = Field(
        default=[],
        exclude_if=lambda scopes: not scopes,
        description="calls that the client's key allows; empty where there are no keys, as all are allowed",
    )


DEFAULT_TEMPLATE = "default"
"""Name of the chat template that is used where no name is given."""


class TokenizerBundle(Message):
    """Everything that a client needs to tokenise exactly as the owner does."""

    tokenizer_json: str = Field(description="the fast tokenizer's own file (`tokenizers.Tokenizer.from_str`)")
    chat_template: str | None = Field(description="the model's Jinja chat template, if it has one")
    special_tokens: dict[str, str] = Field(description="bos_token, eos_token, …, as the chat template expects them")
    # Not sent where there are none: older clients do not know the field.
    named_chat_templates: dict[str, str] = Field(
        default={},
        exclude_if=lambda templates: not templates,
        description="further chat templates of the model by name, such as `tool_use`",
    )

    @property
    def chat_templates(self) -> dict[str, str]:
        """Sources of all chat templates, by name."""
        default = {} if self.chat_template is None else {DEFAULT_TEMPLATE: self.chat_template}
        return default | self.named_chat_templates

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all fields, in hexadecimal."""
        parts = [self.tokenizer_json, self.chat_template or "", repr(sorted(self.special_tokens.items()))]
        if self.named_chat_templates:
            parts.append(repr(sorted(self.named_chat_templates.items())))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class HeadRequest(Message):
    """Rows of the LM head: the chosen `token_ids`, or the range [start, stop)."""

    token_ids: list[TokenId] | None = Field(default=None, description="requested rows, in the order of the answer")
    start: int = Field(default=0, ge=0, description="first row of a range; only without token_ids")
    stop: int | None = Field(default=None, ge=0, description="end of a range (exclusive); only without token_ids")
    dtype: HeadDtype = "float16"


class HeadRows(Message):
    """Rows of the LM head, with the scale and soft-cap that apply to their logits."""

    digest: str
    vocab_size: int
    weight_N_D: FloatMatrix
    bias_N: FloatTensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def head(self) -> LMHead:
        """The rows as a function from hidden states to logits."""
        return LMHead(self.weight_N_D, self.bias_N, self.logit_scale, self.softcap)


class EncodeRequest(Message):
    """The context representations of all positions ≥ `from_position` of every sequence, in one forward pass."""

    token_ids: RaggedIds = Field(description="the sequences, special tokens included")
    from_position: list[int] = Field(description="first position requested, one a sequence (0 for all)")
    echo: list[int] | None = Field(default=None, description="CRC-32 of every sequence; checked if set")
    dtype: WireDtype = Field(default="float16", description="dtype of the representations in the answer")
    with_logsumexp: bool = Field(default=False, description="also send each position's log-sum-exp over V")


class RowsResponse(Message):
    """Fields that the answers to `EncodeRequest` and `DecodeRequest` share."""

    digest: str
    echo: list[int] = Field(description="CRC-32 of the token ids that the model ran, one a sequence")
    rows_B: IntTensor = Field(description="number of rows of each sequence")
    cr_N_D: RowMatrix = Field(description="context representations f(c)")
    cr_scale_N: FloatTensor | None = Field(default=None, description="int8 only: factor of each row")
    last_hidden_N_D: RowMatrix | None = Field(
        default=None,
        description="the head's input; only with CRs of kind ffn_output, which do not give P_PLM",
    )
    last_hidden_scale_N: FloatTensor | None = Field(default=None, description="int8 only: factor of each row")


class EncodeResponse(RowsResponse):
    """Answer to `EncodeRequest`. The CR at position t represents the context that ends with token t."""

    logsumexp_N: FloatTensor | None = Field(default=None, description="log Σ_v exp(logit_v), if requested")


class DecodeRequest(Message):
    """The newest position of every prefix, and `look_ahead` more that the server drafts greedily.

    A client that drafts tokens itself appends them to the prefix, and requests the positions before them, too. One
    forward pass computes all of them.
    """

    token_ids: RaggedIds = Field(description="prompt, tokens generated so far, and the client's drafts if any")
    from_position: list[int] | None = Field(
        default=None, description="first position requested, one a sequence; by default that of the last token"
    )
    look_ahead: list[int] = Field(description="most tokens to draft (k), one number a sequence")
    stop_token_ids: list[TokenId] = Field(default=[], description="a sequence's drafting ends after one of these")
    echo: list[int] | None = Field(default=None, description="CRC-32 of every prefix; checked if set")
    dtype: WireDtype = Field(default="float16", description="dtype of the representations in the answer")


class DecodeResponse(RowsResponse):
    """Answer to `DecodeRequest`: the positions from `from_position` to the prefix's last, then those of drafted tokens.

    A sequence has up to `look_ahead` drafted tokens. The drafts are the top-1 tokens: from the prefix's last position
    on, position j+1 is conditioned on `top1_N[j]`.
    """

    logsumexp_N: FloatTensor
    top1_N: IntTensor = Field(description="the PLM's most probable next token")
    top1_logprob_N: FloatTensor = Field(description="log-probability of that token")


class DistributionRequest(Message):
    """The PLM's next-token distribution after a text or token ids, in a form that suits curl."""

    text: Text | None = Field(
        default=None, description="text to continue, which is text whatever it spells; or give token_ids"
    )
    token_ids: list[TokenId] | None = None
    template: str = Field(default="plain", description="`plain`, or `chat` for the model's own chat template")
    top_k: int = Field(default=10, ge=0, description="number of most probable tokens; 0 for all of V")


class DistributionResponse(Message):
    """The K most probable tokens, most probable first, or all of V in order of id."""

    digest: str
    token_ids_K: IntTensor
    logprob_K: FloatTensor
    tokens: list[str] | None = Field(default=None, description="the tokens as text, unless all of V was requested")

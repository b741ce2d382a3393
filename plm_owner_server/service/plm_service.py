"""The calls of the wire without a transport: all rules about requests are applied here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from plm_owner_server.engines.interface import Encoded, Engine
from plm_owner_server.engines.model_files.tokenizer import bundle_tokenizer
from plm_owner_server.service.disclosed_model import DisclosedModel, DisclosedModels, head_digest, head_dtype
from plm_owner_server.service.metering import CallCost
from plm_owner_server.service.request_texts import RequestTexts
from plm_owner_server.service.requests import CallContext
from plm_owner_server.service.scheduler import Scheduler
from plm_owner_server.service.unbatching import required
from plm_owner_server.service.validation import check_vocabulary
from plm_owner_server.service.worker_threads import set_torch_threads
from plm_owner_server.settings import ServerSettings
from protocol.errors import InvalidRequest, OverLimit, Unsupported
from protocol.integrity import token_crc32s
from protocol.marked_text import MarkedText
from protocol.messages import (
    DecodeRequest,
    DecodeResponse,
    DistributionRequest,
    DistributionResponse,
    EncodeRequest,
    EncodeResponse,
    HeadRequest,
    HeadRows,
    Limits,
    ModelCard,
    TokenizerBundle,
)
from protocol.quantization import quantize
from protocol.types import WireDtype

_LOCAL = CallContext()
_FREE = CallCost()
# A distribution over more tokens than this counts as a full one: weights can be recovered from such.
_MAX_PARTIAL_DISTRIBUTION = 100


class PlmService:
    """Answers the calls of the protocol with one engine. Thread-safe.

    Args:
        engine: runs the model.
        tokenizer: the model's tokenizer.
        name: name of the model on the model card.
        weights_digest: digest of the model's files (`digest_folder`).
        settings: limits of requests and of the queue.
        master_secret: returns the secret from which tenants' rotations are derived.

    Attributes:
        engine: runs the model.
        scheduler: shares the engine between clients.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerFast,
        *,
        name: str,
        weights_digest: str,
        settings: ServerSettings,
        master_secret: Callable[[], bytes],
    ) -> None:
        self.engine = engine
        self._bundle = bundle_tokenizer(tokenizer)
        self._texts = RequestTexts(self._bundle, engine.info.vocab_size)
        cores = torch.get_num_threads()
        self.scheduler = Scheduler(
            engine,
            begin_thread=lambda: set_torch_threads(cores),
            batch_tokens=settings.max_batch_tokens,
            padding_tokens=settings.max_batch_padding,
            drafting_tokens=settings.max_draft_tokens,
            max_waiting_tokens=settings.max_waiting_tokens,
            max_waiting_requests=settings.max_waiting_requests,
        )
        info = engine.info
        max_rows = max(1, settings.max_answer_bytes // (4 * info.hidden_size))
        identity = f"{weights_digest}\0{self._bundle.digest}\0{info.cr_kind}"
        self._card = ModelCard(
            name=name,
            digest=hashlib.sha256(identity.encode()).hexdigest(),
            tokenizer_digest=self._bundle.digest,
            cr_kind=info.cr_kind,
            hidden_size=info.hidden_size,
            vocab_size=info.vocab_size,
            dtype=info.dtype,
            head_dtype=head_dtype(engine.head),
            head_digest=head_digest(engine.head),
            head_bias=engine.head.bias_V is not None,
            softcap=engine.head.softcap,
            eos_token_ids=list(info.eos_token_ids),
            limits=Limits(
                max_sequence_tokens=min(settings.max_sequence_tokens, info.max_tokens or settings.max_sequence_tokens),
                max_sequences=settings.max_sequences,
                max_head_rows=max_rows,
                max_look_ahead=settings.max_look_ahead,
                max_rows=max_rows,
                max_body_bytes=settings.max_body_bytes,
            ),
        )
        self._disclosed_models = DisclosedModels(
            self._card, engine.head, weights_digest=weights_digest, master_secret=master_secret
        )

    def model_card(self, context: CallContext = _LOCAL) -> ModelCard:
        """The model card: identity, kind of CR, sizes, limits."""
        with context.meter.reserve(_FREE):
            return self.card_for(context)

    def card_for(self, context: CallContext) -> ModelCard:
        """The model card that the call's tenant sees. Unlike `model_card`, this is not a call."""
        card = self._disclosed(context).card
        return card.model_copy(update={"scopes": sorted(context.scopes)}) if context.scopes else card

    def _disclosed(self, context: CallContext) -> DisclosedModel:
        return self._disclosed_models.for_tenant(context.tenant, context.disclosure)

    def tokenizer(self, context: CallContext = _LOCAL) -> TokenizerBundle:
        """The fast tokenizer's file and the chat template."""
        with context.meter.reserve(_FREE):
            return self._bundle

    def lm_head(self, request: HeadRequest, context: CallContext = _LOCAL) -> HeadRows:
        """Chosen rows of the LM head, or a range of them.

        Raises:
            InvalidRequest, OverLimit: ids outside the vocabulary, too many rows, an empty range.
            Forbidden, QuotaExceeded, BudgetExhausted: the tenant may not have the rows, or not now.
        """
        disclosed = self._disclosed(context)
        indices = disclosed.head_indices(request)
        # The budget counts a row of the model once, in whatever basis the tenant gets it.
        cost = CallCost(head_rows=indices, model=self._card.digest, vocab_size=self._card.vocab_size)
        with context.meter.reserve(cost):
            rows = disclosed.head_rows(indices, request.dtype)
        context.usage.rows += len(rows.weight_N_D)
        return rows

    def encode(self, request: EncodeRequest, context: CallContext = _LOCAL) -> EncodeResponse:
        """Context representations of the sequences of a request.

        Raises:
            InvalidRequest, OverLimit: the request is not valid.
            Overloaded: too many requests wait already, or (QuotaExceeded) the tenant's share is used up.
            NumericalFault: the representations do not fit the requested dtype.
        """
        sequences = request.token_ids
        self._check_sequences(sequences, request.echo)
        _check_from_position(request.from_position, sequences)
        tokens = sum(map(len, sequences))
        self._check_rows(tokens - sum(request.from_position))

        disclosed = self._disclosed(context)
        with context.meter.reserve(CallCost(tokens=tokens)):
            encoded = self.scheduler.encode(
                context, sequences, request.from_position, with_logsumexp=request.with_logsumexp
            )
            return EncodeResponse(
                digest=disclosed.card.digest,
                echo=encoded.echo,
                rows_B=torch.tensor(encoded.rows),
                logsumexp_N=encoded.logsumexp_N,
                **_rows_on_wire(encoded, disclosed, request.dtype),
            )

    def decode(self, request: DecodeRequest, context: CallContext = _LOCAL) -> DecodeResponse:
        """Positions of every prefix and of up to `look_ahead` drafted tokens, with log-sum-exp and top-1.

        Raises:
            InvalidRequest, OverLimit: the request is not valid.
            Overloaded: too many requests wait already, or (QuotaExceeded) the tenant's share is used up.
            NumericalFault: the representations do not fit the requested dtype.
        """
        sequences, limits = request.token_ids, self._card.limits
        self._check_sequences(sequences, request.echo)
        self._check_vocabulary([request.stop_token_ids])
        _check_one_each("look_ahead", request.look_ahead, sequences)
        for ids, look_ahead in zip(sequences, request.look_ahead, strict=True):
            if not 0 <= look_ahead <= limits.max_look_ahead:
                raise OverLimit(
                    f"look_ahead {look_ahead} was asked for.", hint=f"It may be 0 to {limits.max_look_ahead}."
                )
            if len(ids) + look_ahead > limits.max_sequence_tokens:
                raise OverLimit(
                    f"A prefix of {len(ids)} tokens with {look_ahead} drafted ones is too long.",
                    hint=f"Together they may be {limits.max_sequence_tokens} tokens; lower look_ahead.",
                )
        starts = request.from_position
        if starts is None:
            starts = [len(ids) - 1 for ids in sequences]
        _check_from_position(starts, sequences)
        tokens = sum(map(len, sequences)) + sum(request.look_ahead)
        self._check_rows(tokens - sum(starts))

        disclosed = self._disclosed(context)
        with context.meter.reserve(CallCost(tokens=tokens)) as reservation:
            decoded = self.scheduler.decode(
                context, sequences, starts, request.look_ahead, frozenset(request.stop_token_ids)
            )
            reservation.tokens = sum(starts) + sum(decoded.rows)  # the prefixes and the drafted tokens
            return DecodeResponse(
                digest=disclosed.card.digest,
                echo=decoded.echo,
                rows_B=torch.tensor(decoded.rows),
                logsumexp_N=required(decoded.logsumexp_N),
                top1_N=decoded.top1_N,
                top1_logprob_N=decoded.top1_logprob_N,
                **_rows_on_wire(decoded, disclosed, request.dtype),
            )

    def distribution(self, request: DistributionRequest, context: CallContext = _LOCAL) -> DistributionResponse:
        """The next-token distribution after a text or token ids.

        Raises:
            InvalidRequest, OverLimit, Unsupported: the request is not valid.
            Overloaded, BudgetExhausted: too many requests wait already, or the tenant's quotas are used up.
        """
        token_ids = self._distribution_ids(request)
        self._check_sequences([token_ids], None)
        full = token_ids if request.top_k == 0 or request.top_k > _MAX_PARTIAL_DISTRIBUTION else None
        with context.meter.reserve(CallCost(len(token_ids), full_distribution=full, model=self._card.digest)):
            return self._distribution(token_ids, request.top_k, context)

    def _distribution(self, token_ids: list[int], top_k: int, context: CallContext) -> DistributionResponse:
        encoded = self.scheduler.encode(context, [token_ids], [len(token_ids) - 1])
        last_hidden_1_D = encoded.cr_N_D if encoded.last_hidden_N_D is None else encoded.last_hidden_N_D
        head = self.engine.head
        logits_V = head.logits(last_hidden_1_D.to(head.weight_V_D.device)).float()[0].cpu()
        logprob_V, digest = logits_V.log_softmax(dim=-1), self.card_for(context).digest
        if top_k == 0:
            all_ids_V = torch.arange(len(logprob_V), dtype=torch.int32)
            return DistributionResponse(digest=digest, token_ids_K=all_ids_V, logprob_K=logprob_V)
        logprob_K, ids_K = logprob_V.topk(min(top_k, len(logprob_V)))
        tokens = self._texts.names(ids_K.tolist())
        return DistributionResponse(digest=digest, token_ids_K=ids_K, logprob_K=logprob_K, tokens=tokens)

    def _distribution_ids(self, request: DistributionRequest) -> list[int]:
        if (request.text is None) == (request.token_ids is None):
            raise InvalidRequest("Exactly one of text and token_ids is wanted.", hint='For example {"text": "Hello"}.')
        if request.template not in ("plain", "chat"):
            raise Unsupported("There is no template of this name.", hint="Use 'plain' or 'chat'.")
        if request.text is not None:
            if request.template == "chat":
                return self._texts.chat_token_ids(request.text)
            return self._texts.token_ids(MarkedText(request.text))
        if request.template != "plain":
            raise InvalidRequest("A template is for text, not for token_ids.", hint="Give `text`, or no template.")
        return list(request.token_ids or [])

    def _check_sequences(self, sequences: Sequence[Sequence[int]], echo: list[int] | None) -> None:
        limits = self._card.limits
        if not 0 < len(sequences) <= limits.max_sequences:
            raise OverLimit(
                f"The request has {len(sequences)} sequences.", hint=f"It may have 1 to {limits.max_sequences}."
            )
        for index, ids in enumerate(sequences):
            if not ids:
                raise InvalidRequest(
                    f"Sequence {index} is empty.", hint="Send at least one token, for example the start token."
                )
            if len(ids) > limits.max_sequence_tokens:
                raise OverLimit(
                    f"Sequence {index} has {len(ids)} tokens.",
                    hint=f"It may have {limits.max_sequence_tokens}; shorten the prompt or the text.",
                )
        self._check_vocabulary(sequences)
        if echo is not None and echo != token_crc32s(sequences):
            raise InvalidRequest(
                "The token ids that arrived are not those that the echo was made of.",
                hint="The body was changed on its way, or the echo is not the CRC-32 of little-endian int32 ids.",
            )

    def _check_rows(self, rows: int) -> None:
        if rows > self._card.limits.max_rows:
            raise OverLimit(
                f"The answer would have {rows} rows.",
                hint=f"It may have {self._card.limits.max_rows}; send fewer sequences in one request.",
            )

    def _check_vocabulary(self, sequences: Sequence[Sequence[int]]) -> None:
        check_vocabulary(sequences, self._card.vocab_size)


def _check_one_each(name: str, values: Sequence[int], sequences: Sequence[Sequence[int]]) -> None:
    if len(values) != len(sequences):
        raise InvalidRequest(
            f"{name} has {len(values)} values for {len(sequences)} sequences.", hint="Give one a sequence."
        )


def _check_from_position(values: Sequence[int], sequences: Sequence[Sequence[int]]) -> None:
    _check_one_each("from_position", values, sequences)
    for ids, start in zip(sequences, values, strict=True):
        if not 0 <= start < len(ids):
            raise InvalidRequest(
                f"from_position {start} lies outside a sequence of {len(ids)} tokens.",
                hint="It counts from 0 and must be less than the sequence's length.",
            )


def _rows_on_wire(encoded: Encoded, disclosed: DisclosedModel, dtype: WireDtype) -> dict[str, Tensor | None]:
    """The representations of an answer as the tenant sees them, in the requested number format."""
    cr_N_D, cr_scale_N = quantize(disclosed.rows(encoded.cr_N_D), dtype, "the context representations")
    columns: dict[str, Tensor | None] = {"cr_N_D": cr_N_D, "cr_scale_N": cr_scale_N}
    if encoded.last_hidden_N_D is not None:
        values_N_D, scale_N = quantize(disclosed.rows(encoded.last_hidden_N_D), dtype, "the last hidden states")
        columns |= {"last_hidden_N_D": values_N_D, "last_hidden_scale_N": scale_N}
    return columns

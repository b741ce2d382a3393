"""The calls of the wire, without any wire: every rule of the server is decided here, once, for all transports."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from plm_owner_server.engines.batching import plan_batches
from plm_owner_server.engines.interface import Decoded, DraftBatch, EncodeBatch, Encoded, Engine, EngineStats
from plm_owner_server.engines.model_files.tokenizer import bundle_tokenizer
from plm_owner_server.service.disclosed_model import DisclosedModel, DisclosedModels, head_digest, head_dtype
from plm_owner_server.service.metering import CallCost
from plm_owner_server.service.requests import CallContext, QueueLoad
from plm_owner_server.service.scheduler import Scheduler
from plm_owner_server.service.unbatching import UnbatchedRows, required
from plm_owner_server.service.validation import check_vocabulary
from plm_owner_server.service.worker_threads import set_torch_threads
from plm_owner_server.settings import ServerSettings
from protocol.errors import InvalidRequest, OverLimit, PemaError, Unsupported
from protocol.integrity import echoes
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
# With more tokens than this a distribution counts as a full one: from such, weights can be worked out.
_MOST_OF_A_PART = 100


class PlmService:
    """Answers the calls of the protocol with one engine.

    Thread-safe. The scheduler shares the engine between callers, and turns away what is too much.

    Args:
        weights_digest: digest of the model's files (`models.digest_folder`).
        master_secret: gives what tenants' rotations follow from.
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
        self._engine = engine
        self._tokenizer = tokenizer
        self._settings = settings
        self._bundle = bundle_tokenizer(tokenizer)
        cores = torch.get_num_threads()
        self._scheduler = Scheduler(
            engine,
            begin_thread=lambda: set_torch_threads(cores),
            batch_tokens=settings.batch_tokens,
            padding_tokens=settings.padding_tokens,
            drafting_tokens=settings.drafting_tokens,
            max_waiting_tokens=settings.max_waiting_tokens,
            max_waiting_requests=settings.max_waiting_requests,
        )
        info = engine.info
        most_rows = max(1, settings.max_answer_bytes // (4 * info.hidden_size))
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
                max_head_rows=most_rows,
                max_look_ahead=settings.max_look_ahead,
                max_rows=most_rows,
                max_body_bytes=settings.max_body_bytes,
            ),
        )
        self._views = DisclosedModels(
            self._card, engine.head, weights_digest=weights_digest, master_secret=master_secret
        )

    def load(self) -> QueueLoad:
        """How much there is to do at the moment."""
        return self._scheduler.load()

    @property
    def broken(self) -> threading.Event:
        """Set once the engine works no more."""
        return self._scheduler.broken

    @property
    def busy_s(self) -> float:
        """Seconds that the engine's present piece of work has taken so far."""
        return self._scheduler.busy_s

    def close(self, error: PemaError) -> None:
        """End all calls that wait for the engine or have it, and turn away whatever comes."""
        self._scheduler.close(error)

    def is_alive(self) -> bool:
        """Whether the engine can still work, as far as that can be told without work."""
        return self._engine.is_alive()

    def forget_unused(self) -> None:
        """Drop what is known of texts that were not asked about for long."""
        self._engine.forget_unused()

    def engine_counts(self) -> EngineStats:
        """What the engine has done so far."""
        return self._engine.counts

    def model_card(self, caller: CallContext = _LOCAL) -> ModelCard:
        """Identity, kind of CR, sizes, limits."""
        with caller.meter.charging(_FREE):
            return self._view(caller).card

    def card_of(self, caller: CallContext) -> ModelCard:
        """The model card that a caller is told, for other calls' sake."""
        return self._view(caller).card

    def _view(self, caller: CallContext) -> DisclosedModel:
        return self._views.of(caller.tenant, caller.disclosure)

    def tokenizer(self, caller: CallContext = _LOCAL) -> TokenizerBundle:
        """The fast tokenizer's own file and the chat template."""
        with caller.meter.charging(_FREE):
            return self._bundle

    def lm_head(self, request: HeadRequest, caller: CallContext = _LOCAL) -> HeadRows:
        """Chosen rows of the LM head, or a range of them.

        Raises:
            InvalidRequest, OverLimit: ids outside the vocabulary, too many rows, an empty range.
            Forbidden, QuotaExceeded, BudgetSpent: the tenant may not have them, or not now.
        """
        view = self._view(caller)
        wanted = view.wanted(request)
        # The same row of the same model is the same in every basis.
        cost = CallCost(head_rows=wanted, model=self._card.digest, vocab_size=self._card.vocab_size)
        with caller.meter.charging(cost):
            rows = view.head_rows(wanted, request.dtype)
        caller.spent.rows += len(rows.weight_N_D)
        return rows

    def encode(self, request: EncodeRequest, caller: CallContext = _LOCAL) -> EncodeResponse:
        """Context representations of given sequences, one forward pass each.

        Raises:
            InvalidRequest, OverLimit: see the detail.
            Overloaded: too many requests wait already, or (QuotaExceeded) the tenant's share is used up.
            NumericalFault: the representations do not fit the dtype asked for.
        """
        sequences = request.token_ids
        self._check_sequences(sequences, request.echo)
        _check_from_position(request.from_position, sequences)
        self._check_rows(sum(map(len, sequences)) - sum(request.from_position))

        lengths = [len(ids) for ids in sequences]
        plan = plan_batches(lengths, self._settings.batch_tokens, self._settings.padding_tokens)
        works = [
            EncodeBatch(
                [sequences[i] for i in batch],
                [request.from_position[i] for i in batch],
                request.with_logsumexp,
                caller.tenant,
            )
            for batch in plan
        ]
        view = self._view(caller)
        with caller.meter.charging(CallCost(tokens=sum(lengths))):
            gathered = UnbatchedRows(plan, self._scheduler.run(caller, works), len(sequences))
            return EncodeResponse(
                digest=view.card.digest,
                echo=gathered.echo,
                rows_B=gathered.rows_B,
                logsumexp_N=gathered.optional_rows(lambda r: r.logsumexp_N),
                **_rows_on_wire(gathered, view, request.dtype),
            )

    def decode(self, request: DecodeRequest, caller: CallContext = _LOCAL) -> DecodeResponse:
        """Positions of every prefix and of up to `look_ahead` drafted tokens, with log-sum-exp and top-1.

        Raises:
            InvalidRequest, OverLimit, Overloaded, NumericalFault: as `encode`.
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
        self._check_rows(sum(map(len, sequences)) - sum(starts) + sum(request.look_ahead))
        stop_token_ids = frozenset(request.stop_token_ids)

        lengths = [len(ids) for ids in sequences]
        # No client may take all the room. Padding costs next to nothing: a step runs one token of each sequence.
        room = self._settings.drafting_tokens // 2
        plan = plan_batches(lengths, room, math.inf, drafted=max(request.look_ahead))
        works = [
            DraftBatch(
                [sequences[i] for i in batch],
                [starts[i] for i in batch],
                [request.look_ahead[i] for i in batch],
                stop_token_ids,
                caller.tenant,
            )
            for batch in plan
        ]
        view = self._view(caller)
        with caller.meter.charging(CallCost(tokens=sum(lengths) + sum(request.look_ahead))) as charge:
            results = [result for result in self._scheduler.run(caller, works) if isinstance(result, Decoded)]
            gathered = UnbatchedRows(plan, results, len(sequences))
            charge.tokens = sum(starts) + int(gathered.rows_B.sum())  # the prefixes, and what was drafted after them
            return DecodeResponse(
                digest=view.card.digest,
                echo=gathered.echo,
                rows_B=gathered.rows_B,
                logsumexp_N=gathered.rows(lambda r: required(r.logsumexp_N)),
                top1_N=gathered.rows(lambda r: r.top1_N),
                top1_logprob_N=gathered.rows(lambda r: r.top1_logprob_N),
                **_rows_on_wire(gathered, view, request.dtype),
            )

    def distribution(self, request: DistributionRequest, caller: CallContext = _LOCAL) -> DistributionResponse:
        """The next-token distribution after a text or token ids.

        Raises:
            InvalidRequest, OverLimit, Unsupported, Overloaded, BudgetSpent: see the detail.
        """
        token_ids = self._distribution_ids(request)
        self._check_sequences([token_ids], None)
        full = token_ids if request.top_k == 0 or request.top_k > _MOST_OF_A_PART else None
        with caller.meter.charging(CallCost(len(token_ids), full_distribution=full, model=self._card.digest)):
            return self._distribution(token_ids, request.top_k, caller)

    def _distribution(self, token_ids: list[int], top_k: int, caller: CallContext) -> DistributionResponse:
        work = EncodeBatch([token_ids], [len(token_ids) - 1], tenant=caller.tenant)
        (encoded,) = self._scheduler.run(caller, [work])
        last_hidden_1_D = encoded.cr_N_D if encoded.last_hidden_N_D is None else encoded.last_hidden_N_D
        head = self._engine.head
        logits_V = head.logits(last_hidden_1_D.to(head.weight_V_D.device)).float()[0].cpu()
        logprob_V, digest = logits_V.log_softmax(dim=-1), self._view(caller).card.digest
        if top_k == 0:
            all_ids_V = torch.arange(len(logprob_V), dtype=torch.int32)
            return DistributionResponse(digest=digest, token_ids_K=all_ids_V, logprob_K=logprob_V)
        logprob_K, ids_K = logprob_V.topk(min(top_k, len(logprob_V)))
        tokens = [self._tokenizer.decode([i]) for i in ids_K.tolist()]
        return DistributionResponse(digest=digest, token_ids_K=ids_K, logprob_K=logprob_K, tokens=tokens)

    def _distribution_ids(self, request: DistributionRequest) -> list[int]:
        if (request.text is None) == (request.token_ids is None):
            raise InvalidRequest("Exactly one of text and token_ids is wanted.", hint='For example {"text": "Hello"}.')
        if request.template not in ("plain", "chat"):
            raise Unsupported("There is no template of this name.", hint="Use 'plain' or 'chat'.")
        if request.token_ids is not None:
            if request.template != "plain":
                raise InvalidRequest("A template is for text, not for token_ids.", hint="Give `text`, or no template.")
            return list(request.token_ids)
        if request.template == "plain":
            return list(self._tokenizer(request.text).input_ids)
        if self._bundle.chat_template is None:
            raise Unsupported(f"{self._card.name} has no chat template.", hint="Use the template 'plain'.")
        messages = [{"role": "user", "content": request.text}]
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

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
        if echo is not None and echo != echoes(sequences):
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


def _rows_on_wire(
    gathered: UnbatchedRows[Encoded] | UnbatchedRows[Decoded], view: DisclosedModel, dtype: WireDtype
) -> dict[str, Tensor | None]:
    """The representations of an answer as the tenant sees them, in the number format asked for."""
    cr_N_D, cr_scale_N = quantize(view.rows(gathered.rows(lambda r: r.cr_N_D)), dtype, "the context representations")
    columns: dict[str, Tensor | None] = {"cr_N_D": cr_N_D, "cr_scale_N": cr_scale_N}
    last_hidden_N_D = gathered.optional_rows(lambda r: r.last_hidden_N_D)
    if last_hidden_N_D is not None:
        values_N_D, scale_N = quantize(view.rows(last_hidden_N_D), dtype, "the last hidden states")
        columns |= {"last_hidden_N_D": values_N_D, "last_hidden_scale_N": scale_N}
    return columns

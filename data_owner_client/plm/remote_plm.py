"""The remote PLM: calls in terms of token sequences, with every answer checked."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self, get_args

import torch
from platformdirs import user_cache_path
from torch import Tensor

from data_owner_client.plm.connection.base import Connection, Observer
from data_owner_client.plm.head_cache import CachedHead
from data_owner_client.plm.head_recovery.distributions import Distributions
from data_owner_client.plm.head_recovery.fit import fit_rows
from data_owner_client.plm.tokenizer import PlmTokenizer
from data_owner_client.runtime.atomic_files import write_atomically
from data_owner_client.runtime.progress import Reporter
from protocol import PROTOCOL_VERSION
from protocol.chunks import join_head
from protocol.errors import IdentityMismatch, InvalidData, InvalidRequest, ProtocolViolation, Unsupported
from protocol.head import LMHead
from protocol.integrity import require_finite, token_crc32s
from protocol.messages import (
    DTYPES,
    DecodeRequest,
    DecodeResponse,
    DistributionRequest,
    EncodeRequest,
    EncodeResponse,
    HeadRequest,
    HeadRows,
    ModelCard,
    TokenizerBundle,
)
from protocol.rate_limits import RateLimitStatus
from protocol.types import WireDtype

# Owners count the rows that they give, and labels and forms of answers need the same ones in every call.
_FEW_ROWS_KEPT = 64
# Bound of |log Σ P| for probabilities in float16.
_MAX_LOG_SUM_ERROR = 0.02


class RemotePlm:
    """A PLM behind a connection.

    Every answer is checked. It must come from the model of the card, belong to the token ids that were sent, cover
    every requested position, and be finite. Calls raise `PemaError` if the server refuses or does not answer,
    `IdentityMismatch` if its model has changed, and `ProtocolViolation` if the answer fails a check.

    Args:
        connection: connection over any transport.
        dtype: number format in which representations travel. Head rows always travel as float32.
        cache: folder for tokenizers, LM heads and full distributions, which never change under their digest. None for
            no cache.

    Attributes:
        dtype: number format in which representations travel.
        card: identity, limits and policies of the model.

    Raises:
        InvalidRequest: the number format is unknown.
        ProtocolViolation: the server speaks another version of the protocol.
        PemaError: the server refuses to send the model card, or does not answer.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        dtype: WireDtype = "float16",
        cache: Path | None = user_cache_path("pema"),  # noqa: B008  (a constant of the machine)
    ) -> None:
        if not isinstance(dtype, str) or dtype not in get_args(WireDtype):
            raise InvalidRequest(f"dtype is {dtype!r}.", hint=f"It must be one of {', '.join(get_args(WireDtype))}.")
        self._connection = connection
        self._cache = cache
        self._few_head_rows = lru_cache(maxsize=_FEW_ROWS_KEPT)(lambda ids: self.head_rows(torch.tensor(ids)))
        self.dtype: WireDtype = dtype
        self.card: ModelCard = connection.model_card()
        if self.card.protocol_version != PROTOCOL_VERSION:
            raise ProtocolViolation(
                f"The server speaks version {self.card.protocol_version} of the protocol, this client "
                f"{PROTOCOL_VERSION}.",
                hint="Update the older of the two.",
            )

    @property
    def rate_limits(self) -> tuple[RateLimitStatus, ...]:
        """The client's remaining quotas, as of the newest answer; empty if there are none."""
        return self._connection.rate_limits

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    @contextmanager
    def observed_by(self, observer: Observer) -> Iterator[None]:
        """Pass every attempt of the calls in this context to `observer`."""
        self._connection.observers.append(observer)
        try:
            yield
        finally:
            self._connection.observers.remove(observer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @cached_property
    def tokenizer(self) -> PlmTokenizer:
        """The model's tokenizer, from the cache or the server."""
        digest = self.card.tokenizer_digest
        path = None if self._cache is None else self._cache / "tokenizers" / f"{digest}.json"
        if path is not None and (cached := _read_bundle(path)) is not None and cached.digest == digest:
            return PlmTokenizer(cached, self.card.vocab_size)
        bundle = self._connection.tokenizer()
        if bundle.digest != digest:
            raise ProtocolViolation(
                "The tokenizer is not the one of the model card.", hint="Run this again. Has the server changed?"
            )
        if path is not None:
            with suppress(InvalidData):  # the client works without a writable cache, too
                write_atomically(path, bundle.to_json())
        return PlmTokenizer(bundle, self.card.vocab_size)

    def encode(
        self, sequences: Sequence[Sequence[int]], from_position: Sequence[int], *, with_logsumexp: bool = False
    ) -> EncodeResponse:
        """Context representations of the positions of every sequence, from `from_position` on.

        Args:
            sequences: token ids of each sequence.
            from_position: first position of each sequence that is needed.
            with_logsumexp: also return the log-sum-exp of each position.

        Returns:
            The rows of all sequences, one after another.
        """
        ids = [list(sequence) for sequence in sequences]
        response = self._connection.encode(
            EncodeRequest(
                token_ids=ids,
                from_position=list(from_position),
                echo=token_crc32s(ids),
                dtype=self.dtype,
                with_logsumexp=with_logsumexp,
            )
        )
        expected = [len(sequence) - start for sequence, start in zip(ids, from_position, strict=True)]
        if response.rows_B.tolist() != expected or (with_logsumexp and response.logsumexp_N is None):
            raise _incomplete()
        self._check(response, ids)
        return response

    def decode(
        self,
        prefixes: Sequence[Sequence[int]],
        look_ahead: Sequence[int],
        stop_ids: Sequence[int] = (),
        *,
        from_position: Sequence[int] | None = None,
    ) -> DecodeResponse:
        """Representations of the newest positions of every prefix and of greedily drafted ones.

        Args:
            prefixes: token ids of each prefix.
            look_ahead: number of tokens to draft for each prefix; the server drafts fewer after a stop.
            stop_ids: ids of the tokens that end an answer.
            from_position: first position of each prefix that is needed; None for the newest position alone.

        Returns:
            The rows of all prefixes, one after another. Drafted positions follow those of their prefix.
        """
        ids = [list(prefix) for prefix in prefixes]
        starts = [len(prefix) - 1 for prefix in ids] if from_position is None else list(from_position)
        response = self._connection.decode(
            DecodeRequest(
                token_ids=ids,
                from_position=starts,
                look_ahead=list(look_ahead),
                stop_token_ids=list(stop_ids),
                echo=token_crc32s(ids),
                dtype=self.dtype,
            )
        )
        requested = [len(prefix) - start for prefix, start in zip(ids, starts, strict=True)]
        rows = response.rows_B.tolist()
        if len(rows) != len(ids) or not all(
            n <= m <= n + k for m, n, k in zip(rows, requested, look_ahead, strict=True)
        ):
            raise _incomplete()
        self._check(response, ids)
        return response

    def with_dtype(self, dtype: WireDtype) -> RemotePlm:
        """A view of this PLM over the same connection, with representations in another dtype."""
        other = copy.copy(self)
        other.dtype = dtype
        return other

    def distribution(self, token_ids: Sequence[int]) -> Tensor:
        """log P of every token after `token_ids`, float32 [V]."""
        response = self._connection.distribution(DistributionRequest(token_ids=list(token_ids), top_k=0))
        self._check_digest(response.digest)
        logprob_V = response.logprob_K.float()
        _require_shape(logprob_V, (self.card.vocab_size,), "the next-token distribution")
        if abs(logprob_V.logsumexp(0).item()) > _MAX_LOG_SUM_ERROR:
            raise ProtocolViolation("The server's probabilities of all tokens do not add up to 1.")
        return logprob_V

    def most_probable(self, token_ids: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
        """The most probable tokens after `token_ids`, int64 [K], and log P of each, float32 [K], the highest first."""
        response = self._connection.distribution(DistributionRequest(token_ids=list(token_ids), top_k=count))
        self._check_digest(response.digest)
        _require_shape(response.logprob_K, (count,), "the most probable tokens")
        if response.token_ids_K.shape != (count,) or not _within(response.token_ids_K, self.card.vocab_size):
            raise ProtocolViolation("A probable token of the server lies outside its own vocabulary.")
        return response.token_ids_K.long(), response.logprob_K.float()

    def grants(self, scope: str) -> bool:
        """True if the client's key allows a call."""
        return not self.card.scopes or scope in self.card.scopes

    def cached_distributions(self) -> Distributions:
        """The full distributions in the cache.

        Raises:
            InvalidData: there is no cache.
        """
        if self._cache is None:
            raise InvalidData("There is no cache for full distributions.", hint="Give RemotePlm a `cache` folder.")
        return Distributions(self._cache / "distributions", self.card)

    def head_rows(self, token_ids_C: Tensor) -> LMHead:
        """The LM head's rows of some tokens, in float32.

        If the owner serves no rows (head policy `none`), they are recovered from the full distributions in the cache.

        Raises:
            InvalidData: the cache has too few distributions, or the recovered rows are too far off.
        """
        if self.card.head_policy == "none":
            return fit_rows(self.cached_distributions(), token_ids_C).head
        # Always float32: the rows are few, and an adapter stores them.
        chunks = [
            self._head(HeadRequest(token_ids=ids_N.tolist(), dtype="float32"), len(ids_N))
            for ids_N in token_ids_C.split(self.card.limits.max_head_rows)
        ]
        return join_head(chunks).head()

    def few_head_rows(self, token_ids_K: Tensor) -> LMHead:
        """As `head_rows`, for few tokens that are often the same: the newest results are kept in memory."""
        return self._few_head_rows(tuple(token_ids_K.tolist()))

    def full_head(self, reporter: Reporter | None = None) -> LMHead:
        """All rows of the LM head in the model's own dtype, from the cache or the server.

        An interrupted download is resumed. The cache needs V × D values on disk, the result as many in memory.

        Raises:
            ProtocolViolation: the rows do not match the digest of the model card.
            Unsupported: the owner does not serve the whole head.
            InvalidData: the disk is full, or a cached chunk was damaged.
        """
        self._require_whole_head()
        with TemporaryDirectory() as temporary:
            head = self.cached_head(Path(temporary) if self._cache is None else None)
            head.fetch(self._head_range, reporter)
            return head.load()

    def fetch_head(self, reporter: Reporter | None = None) -> CachedHead:
        """Download all rows of the LM head into the cache, without reading them into memory.

        Raises:
            ProtocolViolation: the rows do not match the digest of the model card.
            Unsupported: the owner does not serve the whole head.
            InvalidData: there is no cache, the disk is full, or a cached chunk was damaged.
        """
        self._require_whole_head()
        head = self.cached_head()
        head.fetch(self._head_range, reporter)
        return head

    def cached_head(self, folder: Path | None = None) -> CachedHead:
        """The LM head in the cache, or in another folder; possibly incomplete.

        Raises:
            InvalidData: there is neither a cache nor another folder.
        """
        base = folder or self._cache
        if base is None:
            raise InvalidData("There is no cache for LM heads.", hint="Give RemotePlm a `cache` folder.")
        return CachedHead(base / "heads", self.card)

    def _require_whole_head(self) -> None:
        if self.card.head_policy != "full":
            raise Unsupported(
                f"The owner does not give you the whole LM head (policy {self.card.head_policy}).",
                hint="Do without: sample with an adapter and --candidates-only, search beams with an adapter, or train "
                "on the candidates.",
            )

    def _head_range(self, start: int, stop: int) -> HeadRows:
        return self._head(HeadRequest(start=start, stop=stop, dtype=self.card.head_dtype), stop - start)

    def _head(self, request: HeadRequest, rows: int) -> HeadRows:
        response = self._connection.lm_head(request)
        self._check_digest(response.digest)
        _require_shape(response.weight_N_D, (rows, self.card.hidden_size), "the LM head")
        if response.weight_N_D.dtype != DTYPES[request.dtype]:
            raise ProtocolViolation(f"The server did not send the LM head as {request.dtype}.")
        if response.bias_N is not None:
            _require_shape(response.bias_N, (rows,), "the LM head's bias")
        return response

    def _check(self, response: EncodeResponse | DecodeResponse, ids: list[list[int]]) -> None:
        self._check_digest(response.digest)
        if response.echo != token_crc32s(ids):
            raise ProtocolViolation(
                "The server's echo shows that it ran other token ids than were sent.",
                hint="Something between client and server changes or mixes requests; nothing was stored.",
            )
        rows = int(response.rows_B.sum())
        self._check_rows(response.cr_N_D, response.cr_scale_N, rows, "the context representations")
        if response.logsumexp_N is not None:
            _require_shape(response.logsumexp_N, (rows,), "the log-sum-exp")
        if (response.last_hidden_N_D is None) != (self.card.cr_kind == "last_hidden_state"):
            raise _incomplete()
        if response.last_hidden_N_D is not None:
            self._check_rows(response.last_hidden_N_D, response.last_hidden_scale_N, rows, "the last hidden states")
        if isinstance(response, DecodeResponse):
            _require_shape(response.top1_N, (rows,), "the top-1 tokens")
            _require_shape(response.top1_logprob_N, (rows,), "the top-1 probabilities")
            if not _within(response.top1_N, self.card.vocab_size):
                raise ProtocolViolation("A top-1 token of the server lies outside its own vocabulary.")

    def _check_rows(self, values_N_D: Tensor, scale_N: Tensor | None, rows: int, label: str) -> None:
        if values_N_D.dtype != DTYPES[self.dtype] or (scale_N is None) != (self.dtype != "int8"):
            raise ProtocolViolation(f"The server did not send {label} as {self.dtype}.", hint="Is it of this version?")
        _require_shape(values_N_D, (rows, self.card.hidden_size), label)
        if scale_N is not None:
            _require_shape(scale_N, (rows,), f"the scales of {label}")

    def _check_digest(self, digest: str) -> None:
        if digest != self.card.digest:
            raise IdentityMismatch(
                f"The server's model changed from {self.card.digest[:12]} to {digest[:12]} meanwhile.",
                hint="Run the command again; a memory or adapter of the old model will be refused, not misused.",
            )


def _read_bundle(path: Path) -> TokenizerBundle | None:
    """The cached tokenizer; None if it is missing or damaged."""
    try:
        return TokenizerBundle.from_json(path.read_bytes())
    except (OSError, InvalidRequest):
        return None


def _within(token_ids_N: Tensor, vocab_size: int) -> bool:
    return int(token_ids_N.min()) >= 0 and int(token_ids_N.max()) < vocab_size


def _require_shape(values: Tensor, shape: tuple[int, ...], label: str) -> None:
    if values.shape != shape:
        raise _incomplete()
    require_finite(values, label)


def _incomplete() -> ProtocolViolation:
    return ProtocolViolation(
        "The server did not answer every requested position.", hint="Nothing was stored; try again."
    )

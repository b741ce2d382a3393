"""The PLM as the data owner sees it: calls in terms of sequences, and no answer that was not checked."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

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
from protocol.integrity import echoes, require_finite
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

# How far the logarithm of a sum of probabilities in float16 may be from 0.
_MOST_EXCESS = 0.02


class RemotePlm:
    """A PLM behind a connection.

    Answers are checked: they come from the model of the card, for the token ids that were sent, for every position
    asked for, and are finite.

    Args:
        connection: any transport.
        dtype: dtype in which representations travel; head rows always travel as float32.
        cache: folder for tokenizers, whole LM heads and what rows are worked out from, which are large and never change
            under their digest; None for no cache.

    Raises:
        ProtocolViolation: the server speaks another version of the protocol.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        dtype: WireDtype = "float16",
        cache: Path | None = user_cache_path("pema"),  # noqa: B008  (a constant of the machine)
    ) -> None:
        self._connection = connection
        self._cache = cache
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
        """What the newest answer said is left of the client's quotas; empty where there are none."""
        return self._connection.rate_limits

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    @contextmanager
    def observed_by(self, observer: Observer) -> Iterator[None]:
        """Tell `observer` of every exchange meanwhile."""
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
        """The model's tokenizer, from the cache if it is there."""
        digest = self.card.tokenizer_digest
        path = None if self._cache is None else self._cache / "tokenizers" / f"{digest}.json"
        if path is not None and (cached := _read_bundle(path)) is not None and cached.digest == digest:
            return PlmTokenizer(cached)
        bundle = self._connection.tokenizer()
        if bundle.digest != digest:
            raise ProtocolViolation(
                "The tokenizer is not the one of the model card.", hint="Run this again. Has the server changed?"
            )
        if path is not None:
            with suppress(InvalidData):  # a cache that cannot be written to is no reason to stop
                write_atomically(path, bundle.to_json())
        return PlmTokenizer(bundle)

    def encode(
        self, sequences: Sequence[Sequence[int]], from_position: Sequence[int], *, with_logsumexp: bool = False
    ) -> EncodeResponse:
        """Context representations of all positions ≥ `from_position`, rows of all sequences one after another."""
        ids = [list(sequence) for sequence in sequences]
        response = self._connection.encode(
            EncodeRequest(
                token_ids=ids,
                from_position=list(from_position),
                echo=echoes(ids),
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
        """Positions of every prefix from `from_position` on (by default the newest), and `look_ahead` drafted ones."""
        ids = [list(prefix) for prefix in prefixes]
        starts = [len(prefix) - 1 for prefix in ids] if from_position is None else list(from_position)
        response = self._connection.decode(
            DecodeRequest(
                token_ids=ids,
                from_position=starts,
                look_ahead=list(look_ahead),
                stop_token_ids=list(stop_ids),
                echo=echoes(ids),
                dtype=self.dtype,
            )
        )
        given = [len(prefix) - start for prefix, start in zip(ids, starts, strict=True)]
        rows = response.rows_B.tolist()
        if len(rows) != len(ids) or not all(n <= m <= n + k for m, n, k in zip(rows, given, look_ahead, strict=True)):
            raise _incomplete()
        self._check(response, ids)
        return response

    def with_dtype(self, dtype: WireDtype) -> RemotePlm:
        """The same PLM over the same connection, with representations in another dtype."""
        other = copy.copy(self)
        other.dtype = dtype
        return other

    def distribution(self, token_ids: Sequence[int]) -> Tensor:
        """log P of every token after the given ones, float32 [V]."""
        response = self._connection.distribution(DistributionRequest(token_ids=list(token_ids), top_k=0))
        self._check_digest(response.digest)
        logprob_V = response.logprob_K.float()
        _require_shape(logprob_V, (self.card.vocab_size,), "the next-token distribution")
        if abs(logprob_V.logsumexp(0).item()) > _MOST_EXCESS:
            raise ProtocolViolation("The server's probabilities of all tokens do not add up to 1.")
        return logprob_V

    def cached_distributions(self) -> Distributions:
        """The full distributions in the cache."""
        if self._cache is None:
            raise InvalidData("There is no cache for full distributions.", hint="Give RemotePlm a `cache` folder.")
        return Distributions(self._cache / "distributions", self.card)

    def head_rows(self, token_ids_C: Tensor) -> LMHead:
        """Chosen rows of the LM head in float32, asked for in pieces of the server's limit.

        Where the owner gives none, they are worked out from the full distributions in the cache.

        Raises:
            InvalidData: there are too few of these.
        """
        if self.card.head_policy == "none":
            return fit_rows(self.cached_distributions(), token_ids_C).head
        # Always float32: an adapter keeps its rows, and they are few.
        pieces = [
            self._head(HeadRequest(token_ids=ids_N.tolist(), dtype="float32"), len(ids_N))
            for ids_N in token_ids_C.split(self.card.limits.max_head_rows)
        ]
        return join_head(pieces).head()

    def full_head(self, reporter: Reporter | None = None) -> LMHead:
        """All rows of the LM head in the model's own dtype, from the cache if they are there.

        A download that was cut off goes on where it was. The cache holds V × D values, as does the result.

        Raises:
            ProtocolViolation: the rows are not those of the model card's digest.
            Unsupported: the owner does not give the whole head.
        """
        self._require_whole_head()
        with TemporaryDirectory() as nowhere:
            head = self.cached_head(Path(nowhere) if self._cache is None else None)
            head.fetch(self._head_range, reporter)
            return head.load()

    def fetch_head(self, reporter: Reporter | None = None) -> CachedHead:
        """Get all rows of the LM head into the cache; otherwise as `full_head`."""
        self._require_whole_head()
        head = self.cached_head()
        head.fetch(self._head_range, reporter)
        return head

    def cached_head(self, folder: Path | None = None) -> CachedHead:
        """What the cache, or another folder, holds of the LM head."""
        base = folder or self._cache
        if base is None:
            raise InvalidData("There is no cache for LM heads.", hint="Give RemotePlm a `cache` folder.")
        return CachedHead(base / "heads", self.card)

    def _require_whole_head(self) -> None:
        if self.card.head_policy != "full":
            raise Unsupported(
                f"The owner does not give you the whole LM head (policy {self.card.head_policy}).",
                hint="Do without: sample with an adapter and --known-only, train on the candidates.",
            )

    def _head_range(self, start: int, stop: int) -> HeadRows:
        return self._head(HeadRequest(start=start, stop=stop, dtype=self.card.head_dtype), stop - start)

    def _head(self, request: HeadRequest, rows: int) -> HeadRows:
        answer = self._connection.lm_head(request)
        self._check_digest(answer.digest)
        _require_shape(answer.weight_N_D, (rows, self.card.hidden_size), "the LM head")
        if answer.weight_N_D.dtype != DTYPES[request.dtype]:
            raise ProtocolViolation(f"The server did not send the LM head as {request.dtype}.")
        if answer.bias_N is not None:
            _require_shape(answer.bias_N, (rows,), "the LM head's bias")
        return answer

    def _check(self, response: EncodeResponse | DecodeResponse, ids: list[list[int]]) -> None:
        self._check_digest(response.digest)
        if response.echo != echoes(ids):
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
            if int(response.top1_N.min()) < 0 or int(response.top1_N.max()) >= self.card.vocab_size:
                raise ProtocolViolation("A top-1 token of the server lies outside its own vocabulary.")

    def _check_rows(self, values_N_D: Tensor, scale_N: Tensor | None, rows: int, what: str) -> None:
        if values_N_D.dtype != DTYPES[self.dtype] or (scale_N is None) != (self.dtype != "int8"):
            raise ProtocolViolation(f"The server did not send {what} as {self.dtype}.", hint="Is it of this version?")
        _require_shape(values_N_D, (rows, self.card.hidden_size), what)
        if scale_N is not None:
            _require_shape(scale_N, (rows,), f"the scales of {what}")

    def _check_digest(self, digest: str) -> None:
        if digest != self.card.digest:
            raise IdentityMismatch(
                f"The server's model changed from {self.card.digest[:12]} to {digest[:12]} meanwhile.",
                hint="Run the command again; a memory or adapter of the old model will be refused, not misused.",
            )


def _read_bundle(path: Path) -> TokenizerBundle | None:
    """A cached tokenizer; None if there is none, or a damaged one."""
    try:
        return TokenizerBundle.from_json(path.read_bytes())
    except (OSError, InvalidRequest):
        return None


def _require_shape(values: Tensor, shape: tuple[int, ...], what: str) -> None:
    if values.shape != shape:
        raise _incomplete()
    require_finite(values, what)


def _incomplete() -> ProtocolViolation:
    return ProtocolViolation(
        "The server did not answer every position that was asked for.", hint="Nothing was stored; try again."
    )

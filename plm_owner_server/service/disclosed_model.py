"""The model as each tenant sees it: the permitted rows of the LM head, in the tenant's basis."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import get_args

import torch
from torch import Tensor

from plm_owner_server.service.disclosure import FULL_DISCLOSURE, Disclosure
from plm_owner_server.service.rotation import Rotation, RotationKey
from plm_owner_server.service.validation import check_vocabulary
from protocol.codec import raw_bytes
from protocol.errors import Forbidden, InvalidRequest, OverLimit, Unsupported
from protocol.head import LMHead
from protocol.integrity import require_finite
from protocol.messages import DTYPES, HeadRequest, HeadRows, ModelCard
from protocol.types import HeadDtype

# Rows of the head that are copied from the device at a time.
_ROWS_AT_ONCE = 4096
# Memory for cached rotations: they are D × D, and take a second or more to make again where D is large.
_ROTATION_BYTES = 2**31


@dataclass(frozen=True)
class DisclosedModel:
    """The model as one tenant sees it.

    Attributes:
        card: the model card that the tenant gets.
        head: the engine's LM head, in the model's basis.
        rotation: rotation into the tenant's secret basis; None for the model's basis.
    """

    card: ModelCard
    head: LMHead
    rotation: Rotation | None

    def rows(self, rows_N_D: Tensor) -> Tensor:
        """Representations in the tenant's basis."""
        return rows_N_D if self.rotation is None else self.rotation.apply(rows_N_D)

    def head_indices(self, request: HeadRequest) -> list[int] | slice:
        """Indices of the rows of the LM head that a request names.

        Raises:
            InvalidRequest, OverLimit: ids outside the vocabulary, too many rows, an empty range.
            Forbidden: the tenant may not have these rows.
        """
        card = self.card
        if card.head_policy == "none":
            raise Forbidden(
                "This owner gives no rows of the LM head.",
                hint="`pema-client train` works those that it needs out of full distributions, if you may have these; "
                "or ask the owner for the policy candidate.",
            )
        if request.token_ids is not None:
            if request.start or request.stop is not None:
                raise InvalidRequest("Both token_ids and a range were given.", hint="Ask for one of the two.")
            check_vocabulary([request.token_ids], card.vocab_size)
            rows = len(request.token_ids)
            indices: list[int] | slice = request.token_ids
        else:
            if card.head_policy != "full":
                raise Forbidden(
                    "This owner gives only rows of chosen tokens, not ranges of the LM head.",
                    hint="Avoid options that need the whole head: sample with --candidates-only, train on candidates.",
                )
            stop = card.vocab_size if request.stop is None else request.stop
            if not request.start < stop <= card.vocab_size:
                raise InvalidRequest(
                    f"[{request.start}, {stop}) is no range of rows.",
                    hint=f"The head has {card.vocab_size} rows; start must be less than stop.",
                )
            rows, indices = stop - request.start, slice(request.start, stop)
        if not 0 < rows <= card.limits.max_head_rows:
            raise OverLimit(
                f"{rows} head rows were asked for.",
                hint=f"One answer has 1 to {card.limits.max_head_rows} rows; ask for more in pieces (start and stop).",
            )
        return indices

    def head_rows(self, indices: list[int] | slice, dtype: HeadDtype) -> HeadRows:
        """Rows of the LM head in the tenant's basis."""
        device = self.head.weight_V_D.device
        chosen = self.head.rows(indices if isinstance(indices, slice) else torch.tensor(indices, device=device))
        return HeadRows(
            digest=self.card.digest,
            vocab_size=self.card.vocab_size,
            weight_N_D=_on_wire(self.rows(chosen.weight_V_D), dtype, "the LM head"),
            bias_N=None if chosen.bias_V is None else _on_wire(chosen.bias_V, dtype, "the LM head's bias"),
            logit_scale=chosen.logit_scale,
            softcap=chosen.softcap,
        )


class _Once:
    """Calls a function once and returns its result every time. Thread-safe."""

    def __init__(self, make: Callable[[], DisclosedModel]) -> None:
        self._make = make
        self._made: DisclosedModel | None = None
        self._lock = threading.Lock()

    def __call__(self) -> DisclosedModel:
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made


class DisclosedModels:
    """Makes and caches the disclosed models of all tenants. Thread-safe.

    Args:
        card: card of the model in its own basis with the whole head.
        head: the engine's LM head.
        weights_digest: digest of the model's files.
        master_secret: returns the secret from which rotations are derived.
    """

    def __init__(
        self, card: ModelCard, head: LMHead, *, weights_digest: str, master_secret: Callable[[], bytes]
    ) -> None:
        self._card = card
        self._head = head
        self._weights_digest = weights_digest
        self._master_secret = master_secret
        max_rotations = max(1, _ROTATION_BYTES // (4 * card.hidden_size**2))
        self._lock = threading.Lock()
        self._cache = lru_cache(maxsize=max_rotations)(lambda *key: _Once(partial(self._make, *key)))

    def for_tenant(self, tenant: str, disclosure: Disclosure) -> DisclosedModel:
        """The model as a tenant sees it. Simultaneous calls wait for the first one to make it.

        Raises:
            Unsupported: the tenant needs a rotation, and there is no master secret to derive it from.
        """
        with self._lock:
            disclosed = self._cache(tenant, disclosure)
        return disclosed()

    def _make(self, tenant: str, disclosure: Disclosure) -> DisclosedModel:
        if disclosure == FULL_DISCLOSURE:
            return DisclosedModel(self._card, self._head, None)
        rotation, basis = None, ""
        if disclosure.rotated:
            key = RotationKey.derive(self._master_secret(), tenant, self._weights_digest)
            rotation = Rotation(key.matrix(self._card.hidden_size).to(self._head.weight_V_D.device))
            basis = key.fingerprint
        # A digest of its own: memories and adapters for one disclosure and basis do not work with another.
        identity = "\0".join([self._card.digest, disclosure.head_policy, basis])
        changes = asdict(disclosure) | {"digest": hashlib.sha256(identity.encode()).hexdigest()}
        if rotation is not None:
            # Not from the rotated rows: to multiply them all takes long, and another machine rounds differently.
            changes["head_digest"] = hashlib.sha256(f"head\0{identity}".encode()).hexdigest()
            changes["head_dtype"] = "float32"  # the rotated rows are not exact in fewer bits
        return DisclosedModel(self._card.model_copy(update=changes), self._head, rotation)


def head_dtype(head: LMHead) -> HeadDtype:
    """Name of the dtype of the head's weight.

    Raises:
        Unsupported: the wire has no such dtype.
    """
    for name in get_args(HeadDtype):
        if head.weight_V_D.dtype == DTYPES[name]:
            return name  # type: ignore[no-any-return]
    raise Unsupported(
        f"The LM head's weight is of dtype {head.weight_V_D.dtype}.", hint=f"Load the model as {get_args(HeadDtype)}."
    )


def head_digest(head: LMHead) -> str:
    """SHA-256 over the head's rows, its bias, its scale and soft-cap."""
    digest = hashlib.sha256()
    for part in (*head.weight_V_D.split(_ROWS_AT_ONCE), *([] if head.bias_V is None else [head.bias_V])):
        digest.update(raw_bytes(part.cpu()))
    digest.update(head.trailer())
    return digest.hexdigest()


def _on_wire(values: Tensor, dtype: HeadDtype, what: str) -> Tensor:
    converted = values.to(DTYPES[dtype]).cpu()
    require_finite(converted, what)
    return converted

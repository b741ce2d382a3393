"""Calls drawn from the tenants' seeded schedules, each with its price and the check of its answer."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from benchmarks.soak.tenants import CANDIDATES, Price, Tenant
from benchmarks.soak.truth import MAX_DRAFTS, Sight, Span, Truth, WrongAnswer
from protocol.codec import Message
from protocol.integrity import token_crc32s
from protocol.messages import DecodeRequest, DistributionRequest, EncodeRequest, HeadRequest
from protocol.types import HeadDtype, WireDtype

Kind = Literal["card", "head", "encode", "decode", "distribution"]
_FREQUENCY: dict[Kind, int] = {"card": 4, "head": 8, "encode": 40, "decode": 34, "distribution": 14}
_DISTRIBUTION_TEXTS = 6  # texts of the pool whose distributions are requested
_TOP_K = 5
_MAX_SEQUENCES = 3  # of a call
_EXACT: HeadDtype = "float32"


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        kind: kind of the call.
        request: the request message; None for the model card.
        price: price of its answer.
        check: raises WrongAnswer if an answer is wrong.
    """

    kind: Kind
    request: Message | None
    price: Price
    check: Callable[[Any], None]


def max_call_tokens(truth: Truth) -> int:
    """Largest number of tokens that a call may cost."""
    return _MAX_SEQUENCES * (max(len(text.ids) for text in truth.pool) + MAX_DRAFTS)


def draw(truth: Truth, tenant: Tenant) -> Call:
    """The next call of a tenant's schedule."""
    kinds = [kind for kind in _FREQUENCY if kind != "head" or tenant.disclosure.head_policy != "none"]
    (kind,) = tenant.chance.choices(kinds, [_FREQUENCY[kind] for kind in kinds])
    return _DRAW[kind](truth, tenant, tenant.seen())


def card(tenant: Tenant) -> Call:
    """A call for the model card, which never changes."""

    def check(answer: Any) -> None:
        if tenant.sight is not None and answer.digest != tenant.sight.digest:
            raise WrongAnswer("another card")

    return Call("card", None, Price(), check)


def head(truth: Truth, ids: list[int], sight: Callable[[], Sight]) -> Call:
    """A call for chosen rows of the LM head."""
    request = HeadRequest(token_ids=ids, dtype=_EXACT)
    return Call("head", request, Price(rows=frozenset(ids)), lambda answer: truth.check_head(answer, ids, sight()))


def _card(truth: Truth, tenant: Tenant, sight: Sight) -> Call:
    return card(tenant)


def _head(truth: Truth, tenant: Tenant, sight: Sight) -> Call:
    chance = tenant.chance
    if tenant.disclosure.head_policy == "full" and tenant.quotas.head_rows is None and chance.random() < 0.3:
        start = chance.randrange(len(truth.head_V_D) - CANDIDATES)
        ids = list(range(start, start + chance.randint(1, CANDIDATES)))
        request = HeadRequest(start=ids[0], stop=ids[-1] + 1, dtype=_EXACT)
        return Call("head", request, Price(rows=frozenset(ids)), lambda answer: truth.check_head(answer, ids, sight))
    return head(truth, chance.sample(tenant.candidates, chance.randint(1, 8)), lambda: sight)


def _encode(truth: Truth, tenant: Tenant, sight: Sight) -> Call:
    chance = tenant.chance
    texts = chance.choices(range(len(truth.pool)), k=chance.randint(1, _MAX_SEQUENCES))
    ids = [truth.pool[text].ids for text in texts]
    starts = [chance.randrange(len(one)) for one in ids]
    request = EncodeRequest(
        token_ids=ids,
        from_position=starts,
        echo=token_crc32s(ids),
        dtype=(dtype := _dtype(chance)),
        with_logsumexp=chance.random() < 0.5,
    )
    spans = [Span(text, start, len(one)) for text, start, one in zip(texts, starts, ids, strict=True)]

    def check(answer: Any) -> None:
        truth.check_rows(answer, spans, dtype, sight)
        if request.with_logsumexp != (answer.logsumexp_N is not None):
            raise WrongAnswer("log-sum-exp or none")

    return Call("encode", request, Price(sum(map(len, ids))), check)


def _decode(truth: Truth, tenant: Tenant, sight: Sight) -> Call:
    chance = tenant.chance
    texts = chance.choices(range(len(truth.pool)), k=chance.randint(1, _MAX_SEQUENCES))
    ids = [truth.pool[text].ids for text in texts]
    starts = [len(one) - 1 if chance.random() < 0.5 else chance.randrange(len(one)) for one in ids]
    drafts = [chance.randint(0, MAX_DRAFTS) for _ in ids]
    request = DecodeRequest(
        token_ids=ids, from_position=starts, look_ahead=drafts, echo=token_crc32s(ids), dtype=(dtype := _dtype(chance))
    )
    spans = [Span(text, s, len(one) + k) for text, s, one, k in zip(texts, starts, ids, drafts, strict=True)]
    # Without stop tokens, as many tokens are drafted as requested.
    price = Price(sum(map(len, ids)) + sum(drafts))
    return Call("decode", request, price, lambda answer: truth.check_rows(answer, spans, dtype, sight))


def _distribution(truth: Truth, tenant: Tenant, sight: Sight) -> Call:
    chance = tenant.chance
    text, top_k = chance.randrange(_DISTRIBUTION_TEXTS), 0 if chance.random() < 0.4 else _TOP_K
    pool_text = truth.pool[text]
    if chance.random() < 0.5:
        request = DistributionRequest(text=pool_text.text, top_k=top_k)
    else:
        request = DistributionRequest(token_ids=pool_text.ids, top_k=top_k)
    price = Price(len(pool_text.ids), distribution=text if top_k == 0 else None)
    return Call("distribution", request, price, lambda answer: truth.check_distribution(answer, text, top_k, sight))


def _dtype(chance: random.Random) -> WireDtype:
    return "float16" if chance.random() < 0.3 else "float32"


_DRAW: dict[Kind, Callable[[Truth, Tenant, Sight], Call]] = {
    "card": _card,
    "head": _head,
    "encode": _encode,
    "decode": _decode,
    "distribution": _distribution,
}


def sight_of(digest: str, tenant: Tenant, rows: Any, ids: list[int]) -> Sight:
    """The tenant's sight of the model, from its card and its first head rows."""
    if rows is None:
        return Sight(digest, tenant.disclosure.rotated)
    head_C = rows.head()
    if not torch.isfinite(head_C.weight_V_D).all():
        raise WrongAnswer("head rows that are not finite")
    return Sight(digest, tenant.disclosure.rotated, ids, head_C)

"""The extension `pema` of an answer: who chose each token, and what the owner was shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from data_owner_client.decoding.stats import CallCounts
from data_owner_client.decoding.token_choice import TokenChoice
from data_owner_client.plm.tokenizer import PlmTokenizer
from protocol.rate_limits import RateLimitStatus

NO_PROBABILITY = -9999.0
"""Log-probability of an impossible token, as in OpenAI's API: JSON has no −∞."""
EXPLAINED_ALTERNATIVES = 5
"""Most probable tokens of each side in an explanation."""

Decision = Literal["both", "adapter", "plm", "neither"]


def explain(tokenizer: PlmTokenizer, choices: Sequence[TokenChoice]) -> list[dict[str, Any]]:
    """Each token with λ, both sides' scores and favourites, and the side that decided."""
    return [_explained(tokenizer, choice) for choice in choices]


def _explained(tokenizer: PlmTokenizer, choice: TokenChoice) -> dict[str, Any]:
    found = choice.alternatives
    return {
        **_token(tokenizer, choice.token),
        "lambda": choice.lambda_t,
        "share": choice.share,
        "decided_by": decided_by(choice),
        "logprob": finite(choice.logprob),
        "plm_logprob": finite(choice.plm_logprob),
        "pema_logprob": None if choice.pema_logprob is None else finite(choice.pema_logprob),
        "plm_top": _listed(tokenizer, found.plm if found else []),
        "pema_top": _listed(tokenizer, found.pema) if found and found.pema else None,
        "mixture_top": _listed(tokenizer, found.mixture if found else []),
        "unlisted": found.unlisted if found else None,
    }


def decided_by(choice: TokenChoice) -> Decision:
    """The side whose favourite the token is. `adapter` means that it overruled the model, `plm` that the model held."""
    plm, pema = choice.token == choice.plm_token, choice.token == choice.pema_token
    if plm:
        return "both" if pema else "plm"
    return "adapter" if pema else "neither"


def shown_to_owner(counts: CallCounts, quotas: Sequence[RateLimitStatus]) -> dict[str, Any]:
    """Tokens, calls and bytes that an answer took, and the quotas that are left."""
    return {
        "tokens": counts.tokens,
        "round_trips": counts.round_trips,
        "sent_bytes": counts.bytes_sent,
        "received_bytes": counts.bytes_received,
        "quota": [asdict(quota) for quota in quotas],
    }


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return logprob if logprob > -math.inf else NO_PROBABILITY


def token_bytes(tokenizer: PlmTokenizer, token_id: int) -> list[int] | None:
    """UTF-8 bytes of a token's text, possibly of a part of a character; None for a token without text."""
    known = tokenizer.token_bytes[token_id] if token_id < len(tokenizer.token_bytes) else None
    return None if known is None else list(known)


def _token(tokenizer: PlmTokenizer, token_id: int) -> dict[str, Any]:
    return {"id": token_id, "text": tokenizer.name(token_id), "bytes": token_bytes(tokenizer, token_id)}


def _listed(tokenizer: PlmTokenizer, tokens: Sequence[tuple[int, float]]) -> list[dict[str, Any]]:
    return [_token(tokenizer, token) | {"logprob": finite(logprob)} for token, logprob in tokens]

"""What a client may still use of its quotas. It travels beside every answer, in two fields over either transport.

They are `RateLimit` and `RateLimit-Policy` of draft-ietf-httpapi-ratelimit-headers, which are structured fields.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

RATE_LIMIT = "RateLimit"
"""HTTP's field, and in small letters gRPC's trailing metadata: what is left of each quota."""
RATE_LIMIT_POLICY = "RateLimit-Policy"
"""Likewise: the quotas themselves."""

_ITEM = re.compile(r'\s*"([a-z-]{1,64})"((?:\s*;\s*[a-z]+=(?:[0-9]{1,15}|"[a-z-]{0,64}"))*)\s*')
_PARAMETER = re.compile(r';\s*([a-z]+)="?([0-9a-z-]*)"?')


@dataclass(frozen=True)
class RateLimitStatus:
    """One quota, and what is left of it.

    Attributes:
        name: minute, day, concurrent, head-rows or full-distributions.
        quota: how much there is in all.
        left: how much is left.
        unit: what is counted.
        window_s: seconds for which the quota is; None if it does not come back by itself.
        resets_s: seconds until all of it is there again; likewise.
    """

    name: str
    quota: int
    left: int
    unit: str
    window_s: int | None = None
    resets_s: int | None = None

    def __str__(self) -> str:
        """As people read it."""
        again = "" if self.resets_s is None else f", all again in {self.resets_s:,} s"
        return f"{self.left:,} of {self.quota:,} {self.unit.replace('-', ' ')}{again}"


def to_fields(allowances: Sequence[RateLimitStatus]) -> dict[str, str]:
    """The two fields by name; none where there are no quotas."""
    if not allowances:
        return {}
    left = [f'"{a.name}";r={a.left}' + ("" if a.resets_s is None else f";t={a.resets_s}") for a in allowances]
    policy = [
        f'"{a.name}";q={a.quota}' + ("" if a.window_s is None else f";w={a.window_s}") + f';qu="{a.unit}"'
        for a in allowances
    ]
    return {RATE_LIMIT: ", ".join(left), RATE_LIMIT_POLICY: ", ".join(policy)}


def from_fields(rate_limit: str, policy: str) -> tuple[RateLimitStatus, ...]:
    """What two such fields say. What is of another kind is left out, as a proxy may write some, too."""
    left, quotas = _items(rate_limit), _items(policy)
    return tuple(
        RateLimitStatus(
            name,
            int(quotas[name]["q"]),
            int(left[name]["r"]),
            quotas[name]["qu"],
            _number(quotas[name], "w"),
            _number(left[name], "t"),
        )
        for name in left
        if left[name].get("r", "").isdecimal()
        and quotas.get(name, {}).get("q", "").isdecimal()
        and "qu" in quotas[name]
    )


def _items(field: str) -> dict[str, dict[str, str]]:
    matches = [match for part in field.split(",") if (match := _ITEM.fullmatch(part))]
    return {match[1]: dict(_PARAMETER.findall(match[2])) for match in matches}


def _number(parameters: dict[str, str], name: str) -> int | None:
    value = parameters.get(name, "")
    return int(value) if value.isdecimal() else None

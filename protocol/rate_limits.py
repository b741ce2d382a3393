"""Remainder of a client's quotas, which travels beside every answer in two fields, over both transports.

The fields are `RateLimit` and `RateLimit-Policy` of draft-ietf-httpapi-ratelimit-headers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

RATE_LIMIT = "RateLimit"
"""Remainder of each quota: name of the HTTP header, and in small letters of gRPC's trailing metadata."""
RATE_LIMIT_POLICY = "RateLimit-Policy"
"""The quotas: name of the HTTP header, and in small letters of gRPC's trailing metadata."""

_ITEM = re.compile(r'\s*"([a-z-]{1,64})"((?:\s*;\s*[a-z]+=(?:[0-9]{1,15}|"[a-z-]{0,64}"))*)\s*')
_PARAMETER = re.compile(r';\s*([a-z]+)="?([0-9a-z-]*)"?')


@dataclass(frozen=True)
class RateLimitStatus:
    """One quota and its remainder.

    Attributes:
        name: minute, day, concurrent, head-rows or full-distributions.
        quota: the limit.
        left: the part of the limit that is left.
        unit: unit of both numbers, such as tokens.
        window_s: length of the quota's window in seconds; None if the quota is not per window.
        resets_s: seconds until the window is over and all of the quota is left; None if the quota is not per window.
    """

    name: str
    quota: int
    left: int
    unit: str
    window_s: int | None = None
    resets_s: int | None = None

    def __str__(self) -> str:
        """The remainder in words, for people."""
        again = "" if self.resets_s is None else f", all again in {self.resets_s:,} s"
        return f"{self.left:,} of {self.quota:,} {self.unit.replace('-', ' ')}{again}"


def to_fields(rate_limits: Sequence[RateLimitStatus]) -> dict[str, str]:
    """The two fields by name; empty if there are no quotas."""
    if not rate_limits:
        return {}
    left = [f'"{a.name}";r={a.left}' + ("" if a.resets_s is None else f";t={a.resets_s}") for a in rate_limits]
    policy = [
        f'"{a.name}";q={a.quota}' + ("" if a.window_s is None else f";w={a.window_s}") + f';qu="{a.unit}"'
        for a in rate_limits
    ]
    return {RATE_LIMIT: ", ".join(left), RATE_LIMIT_POLICY: ", ".join(policy)}


def from_fields(rate_limit: str, policy: str) -> tuple[RateLimitStatus, ...]:
    """Parse the two fields. Items of another kind, as a proxy may add, are left out."""
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

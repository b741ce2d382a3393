"""Names of the ways to make contexts. Free of torch, so that settings and options can import it."""

from __future__ import annotations

from typing import Literal

ContextMode = Literal["private", "redacted", "teacher-forced"]
"""Source of a memory's contexts.

`private`: the PLM's own drafts; no target leaves the client.
`redacted`: the targets, with surrogates in place of the spans that stay with the client.
`teacher-forced`: the targets themselves.
"""

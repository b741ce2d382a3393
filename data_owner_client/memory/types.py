"""Names of the ways to make contexts. Free of torch, so that settings and options can import it."""

from __future__ import annotations

from typing import Literal

ContextMode = Literal["private", "teacher-forced"]
"""Source of a memory's contexts: the PLM's own drafts (no target leaves the client), or the targets themselves."""

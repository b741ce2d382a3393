"""Paths in reports. A path may hold bytes that are not UTF-8, and JSON may not."""

from __future__ import annotations

from typing import Annotated

from pydantic import PlainSerializer

PathText = Annotated[str, PlainSerializer(lambda path: path.encode(errors="replace").decode())]
"""A path whose bytes that are not UTF-8 become question marks where the report is written or shown."""

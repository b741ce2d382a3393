"""Server-sent events of a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

from data_owner_client.gateway.openai.errors import ApiError, api_error
from protocol.errors import PemaError

MEDIA_TYPE = "text/event-stream"
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_SECONDS = 15.0
"""Longest silence of a stream: proxies cut longer ones off."""


def frame(document: Mapping[str, Any]) -> bytes:
    """One event. Its JSON is ASCII, as some clients end lines at U+2028."""
    return f"data: {json.dumps(document, separators=(',', ':'), allow_nan=False)}\n\n".encode()


async def server_sent_events(
    chunks: AsyncIterator[Mapping[str, Any]], keep_alive_s: float = KEEP_ALIVE_SECONDS
) -> AsyncIterator[bytes]:
    """The events of a stream; an error becomes an event of its own before the end.

    The chunks' iterator is closed with this one.

    Args:
        chunks: bodies of the chunks.
        keep_alive_s: seconds of silence before a comment is sent.
    """
    pending: asyncio.Future[Mapping[str, Any]] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(chunks))
            await asyncio.wait([pending], timeout=keep_alive_s)
            if not pending.done():
                yield KEEP_ALIVE
                continue
            done, pending = pending, None
            yield frame(done.result())
    except StopAsyncIteration:
        yield DONE
    except (ApiError, PemaError) as error:
        yield frame((error if isinstance(error, ApiError) else api_error(error)).body)
        yield DONE
    finally:
        if pending is not None:
            pending.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration, ApiError, PemaError):
                await pending
        if isinstance(chunks, AsyncGenerator):
            await chunks.aclose()

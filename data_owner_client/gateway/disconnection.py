"""Requests whose clients hang up before they are answered."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request

_Result = TypeVar("_Result")


class ClientDisconnected(Exception):
    """The client has hung up, so nobody reads the answer."""


async def while_connected(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Do the work of a request, and cancel it when the client hangs up; return its result.

    Args:
        request: a request whose body has been read.
        work: the work.

    Raises:
        ClientDisconnected: the client has hung up.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnected
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _disconnected(request: Request) -> None:
    """Return when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

"""Requests that the gateway does not answer, because of their host, origin, key, content type or size.

A web page whose name is pointed to this machine (DNS rebinding) could otherwise call a gateway on loopback from the
browser of anybody here. Its requests name the page's host. Pages of other origins are refused in the same place.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from data_owner_client.gateway.openai.errors import ApiError, error_response
from data_owner_client.gateway.settings import GatewaySettings
from protocol.addresses import ip_address, is_loopback

JSON = "application/json"
# Longest time for the body of a request.
_BODY_SECONDS = 60.0
_SCHEME_PORTS = frozenset({80, 443})


class AllowedHosts:
    """Rule for the hosts that requests may name.

    Names of this machine are allowed with the gateway's port; further names as the settings have them. A gateway for
    other machines also takes IP addresses, which no page of the web can have as its name.

    Args:
        settings: settings of the gateway.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self._port = settings.port
        self._is_local = is_loopback(settings.host)
        named = [_host_and_port(name) for name in (settings.host, *settings.allowed_hosts)]
        self._named = frozenset((host, self._port if port is None else port) for host, port in named)

    def allows(self, authority: str) -> bool:
        """Return whether a request may name this host.

        Args:
            authority: a host, with its port unless that is the scheme's own.
        """
        host, port = _host_and_port(authority)
        ports = _SCHEME_PORTS if port is None else {port}
        if any((host, each) in self._named for each in ports):
            return True
        is_ours = is_loopback(host) or (not self._is_local and ip_address(host) is not None)
        return is_ours and self._port in ports


def _host_and_port(authority: str) -> tuple[str, int | None]:
    """Host in small letters, and port; an empty host if it is none, and no port where none is named."""
    if not authority.isascii() or any(character in authority for character in "@/?#\\ \t"):
        return "", None
    if ip_address(authority):
        return str(ip_address(authority)), None
    try:
        parts = urlsplit(f"//{authority}")
        host = (parts.hostname or "").removesuffix(".")
        return str(ip_address(host) or host), parts.port
    except ValueError:
        return "", None


class OriginGuard:
    """Middleware that refuses hosts that are not the gateway's, and pages of other hosts.

    Args:
        app: the application.
        settings: settings of the gateway.
    """

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._hosts = AllowedHosts(settings)
        self._origins = frozenset(settings.allow_origin)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or the application's life."""
        app = self._refusal(Headers(scope=scope)) if scope["type"] == "http" else None
        await (app or self._app)(scope, receive, send)

    def _refusal(self, headers: Headers) -> Response | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._hosts.allows(host):
            return error_response(
                ApiError(
                    421,
                    "The request names a host that the gateway does not answer. Use http://127.0.0.1 with the "
                    "gateway's port; another name must be among its --allowed-hosts.",
                    code="misdirected",
                )
            )
        if origin is None or origin in self._origins or origin.partition("://")[2] == host:
            return None
        return error_response(
            ApiError(
                403,
                "The request comes from a web page of another host. The gateway's --allow-origin names the pages that "
                "may call it.",
                code="origin_not_allowed",
            )
        )


class RequestGuard:
    """Middleware that demands the key and JSON, and reads bodies up to a limit.

    Args:
        app: the application.
        settings: settings of the gateway.
        open_paths: paths that are answered without a key, where they are only read.
    """

    def __init__(self, app: ASGIApp, settings: GatewaySettings, open_paths: Collection[str]) -> None:
        self._app = app
        self._key = None if settings.gateway_key is None else settings.gateway_key.encode()
        self._max_body_bytes = settings.max_body_bytes
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or the application's life."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._require_key(scope)
            if scope["method"] == "POST":
                receive = await self._with_body(Headers(scope=scope), receive)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
        except _Disconnected:
            return
        else:
            await self._app(scope, receive, send)

    def is_authorised(self, headers: Headers) -> bool:
        """Return whether a request has the key, or needs none."""
        if self._key is None:
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._key)

    def _require_key(self, scope: Scope) -> None:
        scope.setdefault("state", {})["is_authorised"] = authorised = self.is_authorised(Headers(scope=scope))
        if not authorised and not (scope["method"] in {"GET", "HEAD"} and scope["path"] in self._open_paths):
            raise ApiError(
                401,
                "The key is missing or wrong. Send the gateway's key as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _with_body(self, headers: Headers, receive: Receive) -> Receive:
        """A `receive` that has the whole body.

        Raises:
            ApiError: the body is no JSON, too large or too slow.
        """
        # Pages of other hosts can send other types without asking first.
        if headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
            raise ApiError(415, f"The body must be JSON. Send `Content-Type: {JSON}`.", code="unsupported_media_type")
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                body = await self._body(headers, receive)
        except TimeoutError as error:
            raise ApiError(408, f"The body took longer than {_BODY_SECONDS:g} s.", code="too_slow") from error
        unread = [body]

        async def replayed() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()

        return replayed

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        declared = headers.get("content-length", "0")
        parts, size = list[bytes](), int(declared) if declared.isdecimal() else 0
        too_large = ApiError(
            413, f"The body is larger than {self._max_body_bytes:,} bytes. Send less.", code="payload_too_large"
        )
        if size > self._max_body_bytes:
            raise too_large
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Disconnected
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > self._max_body_bytes:
                raise too_large
        return b"".join(parts)


class _Disconnected(Exception):
    """The client has hung up."""

"""What every request passes: who may come in, how much may be carried in, and the count of what went out."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence

from .errors import ApiError
from .metrics import Metrics
from .schemas import Limits

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
OPEN = ("/health",)


class Door:
    """ASGI middleware.

    Args:
        keys: any of them lets in; none: everybody may come in.
        hosts: the names by which the server may be called, without port; empty: any. A web page that has its own name
            point to 127.0.0.1 could read the answers of a server that listens to any.
    """

    def __init__(self, app, limits: Limits, metrics: Metrics, keys: Sequence[str] = (), hosts: Sequence[str] = ()):
        self.app, self.limits, self.metrics = app, limits, metrics
        self.keys, self.hosts = [key.encode() for key in keys], [host.lower().encode() for host in hosts]

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500

        async def counted(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await asyncio.wait_for(send(message), self.limits.stalled_seconds)

        try:
            self._check(scope)
            body = await self._body(scope, receive)
            await self.app(scope, body, counted)
        except ApiError as error:
            await error.response(scope, receive, counted)
        finally:
            route = scope.get("route")
            self.metrics.requests.labels(getattr(route, "path", "other"), status).inc()

    def _check(self, scope) -> None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").lower()
        name = host if host.endswith(b"]") else host.rpartition(b":")[0] or host
        if self.hosts and name not in self.hosts:
            message = f"this server is not called {name.decode(errors='replace')!r}: say --allow-host, or --host"
            raise ApiError(421, message, code="unknown_host")
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if self.keys and scope["path"] not in OPEN:
            matches = [hmac.compare_digest(key, given.strip()) for key in self.keys]  # all of them, in constant time
            if scheme.lower() != b"bearer" or not any(matches):
                raise ApiError(
                    401, "the API key is missing or wrong: Authorization: Bearer KEY", code="invalid_api_key"
                )
        if scope["method"] == "POST" and not headers.get(b"content-type", b"").lower().startswith(b"application/json"):
            # a form of any web page could be sent as another type without its browser asking us
            raise ApiError(415, "the body has to be JSON: Content-Type: application/json")

    async def _body(self, scope, receive):
        """A `receive` that hands out the body, read as a whole, and then waits for the client to leave.

        Raises:
            ApiError: 413 for one that is too large, 408 for one that takes too long.
        """
        body, more, limit = bytearray(), True, self.limits.body
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            raise ApiError(413, f"the body has {int(declared):,} bytes, {limit:,} are taken", code="too_large")
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > limit:
                        raise ApiError(413, f"the body has more than {limit:,} bytes", code="too_large")
        except TimeoutError:
            raise ApiError(408, f"the body took more than {self.limits.body_seconds} s") from None
        messages = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def from_memory():
            return messages.pop() if messages else await receive()

        return from_memory

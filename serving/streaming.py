"""Answers on their way: each response ends when its client leaves, and gives back what it held."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from fastapi import Request
from starlette.responses import Response

from .errors import ApiError, as_api_error

T = TypeVar("T")
CLIENT_LEFT = ApiError(499, "the client left")


async def leaves(receive: Callable[[], Awaitable[dict]]) -> None:
    """Returns when the client has."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_client_leaves(request: Request, work: Awaitable[T], cancel: Callable[[], None]) -> T:
    """The result of `work`; calls `cancel` however it ends, and raises CLIENT_LEFT where nobody waits for it."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(leaves(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise CLIENT_LEFT
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        cancel()


class EventStream(Response):
    """Server-sent events: a line `data: JSON` for each item, a comment for None, and [DONE] in the end.

    What ends the items with an error is sent as an event, since the status is out already.
    """

    media_type = "text/event-stream"

    def __init__(self, items: AsyncIterator[dict | None], cancel: Callable[[], None]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.items, self.cancel = items, cancel

    async def __call__(self, scope, receive, send) -> None:
        sending, leaving = (asyncio.ensure_future(one) for one in (self._send(send), leaves(receive)))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except (OSError, TimeoutError):  # left, or reads nothing
            pass
        finally:
            sending.cancel()
            leaving.cancel()
            self.cancel()

    async def _send(self, send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for line in self._lines():
            await send({"type": "http.response.body", "body": line.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _lines(self) -> AsyncIterator[str]:
        try:
            async for item in self.items:
                yield ": waiting\n\n" if item is None else f"data: {json.dumps(item, ensure_ascii=False)}\n\n"
        except Exception as error:
            yield f"data: {json.dumps(as_api_error(error).body, ensure_ascii=False)}\n\n"
            return
        yield "data: [DONE]\n\n"

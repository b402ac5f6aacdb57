"""A stream of server-sent events: headers at once, comments while silent, closed when the client leaves."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.disconnect import unless_disconnected

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def event(content: dict[str, Any]) -> bytes:
    """One event with JSON in it; where that says its type, the event has it as a name."""
    name = f"event: {content['type']}\n".encode() if "type" in content else b""
    return name + b"data: " + msgspec.json.encode(content) + b"\n\n"


class EventStream(Response):
    """Sends what a generator of events yields, and closes it on every path, the client's leaving included."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], keep_alive_seconds: float) -> None:
        # X-Accel-Buffering: nginx would hold a stream back.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]  # of the empty body that Response was given
        self._events = _with_keep_alive(events, keep_alive_seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._send(send))
        except ClientDisconnect:
            pass
        finally:
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for content in self._events:
            await send({"type": "http.response.body", "body": content, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _with_keep_alive(
    events: AsyncGenerator[bytes, None], seconds: float
) -> AsyncGenerator[bytes, None]:
    """The events, with a comment whenever none came for so many seconds of wall-clock time."""
    upcoming = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            await asyncio.wait({upcoming}, timeout=seconds)
            if not upcoming.done():
                yield KEEP_ALIVE
                continue
            content = upcoming.result()
            if content is None:
                return
            yield content
            upcoming = asyncio.ensure_future(anext(events, None))
    finally:
        upcoming.cancel()
        await asyncio.wait({upcoming})
        await events.aclose()

"""Work that ends when its client leaves: without it, a long prompt would be computed for nobody."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

_Result = TypeVar("_Result")


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of `work`, which is cancelled if the client leaves; ClientDisconnect then.

    The request's body must have been read: the next thing to receive is the disconnect.
    """
    worker = asyncio.create_task(work)
    leaver = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({worker, leaver}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientDisconnect
        return worker.result()
    finally:
        # Wait until both have cleaned up: the engine must have heard of the abort when this returns.
        for task in (worker, leaver):
            task.cancel()
        await asyncio.gather(worker, leaver, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

"""Admin: what an operator with the admin key may do to a server that runs."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi.responses import JSONResponse, Response

from engine.client import Engine
from server.limits import Limits

ADMIN_PATH = "/admin"  # and all below it need the admin key


@dataclass(slots=True)
class Admin:
    """The endpoints, and whether new requests are turned away."""

    limits: Limits
    engine: Engine
    is_draining: bool = False

    def endpoints(self) -> dict[str, Callable[[], Awaitable[Response]]]:
        """URL path to endpoint."""
        return {
            f"{ADMIN_PATH}/drain": self.drain,
            f"{ADMIN_PATH}/resume": self.resume,
            f"{ADMIN_PATH}/cache/clear": self.clear_cache,
        }

    async def drain(self) -> Response:
        """POST /admin/drain: not ready from now on; what is open goes on to its end."""
        self.is_draining = True
        return self._state()

    async def resume(self) -> Response:
        """POST /admin/resume: ready again."""
        self.is_draining = False
        return self._state()

    async def clear_cache(self) -> Response:
        """POST /admin/cache/clear: forget the beginnings of prompts that nobody reads now."""
        cleared = await self.engine.clear_cache()
        return JSONResponse({"pages": cleared.pages, "host_pages": cleared.host_pages})

    def _state(self) -> Response:
        return JSONResponse({"draining": self.is_draining, "open_requests": self.limits.num_open})

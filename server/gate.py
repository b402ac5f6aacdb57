"""Gate: what every request passes before any route sees it: size of its head, name, API key, limits."""

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import ServeError
from server import errors
from server.admin import ADMIN_PATH
from server.auth import Keys
from server.docs_page import DOCS_PATHS
from server.limits import Limits, Visit
from server.page import PAGE_PATHS

# Everything else, found or not, needs a key; what the page asks for does, too.
OPEN_PATHS = frozenset({"/livez", "/readyz", "/health"}) | PAGE_PATHS | DOCS_PATHS
MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 * 1024
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class Gate:
    """Around the application. Its reply carries `x-request-id`: the client's own if that is a plain word."""

    def __init__(self, app: ASGIApp, keys: Keys, limits: Limits) -> None:
        self._app = app
        self._keys = keys
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        visit = Visit(given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = visit.request_id
            await send(message)

        try:
            self._check_head(scope)
            if scope["path"] in OPEN_PATHS:
                await self._app(scope, receive, named)
                return
            self._identify(visit, headers)
            self._check_admin(scope["path"], headers)
            is_work = scope["method"] == "POST" and not _is_admin(scope["path"])
            if is_work:  # a full server can still be looked at, and drained
                self.limits.open(visit)
        except ServeError as error:
            await errors.reply(error)(scope, receive, named)
            return
        try:
            scope.setdefault("state", {})["visit"] = visit
            await self._app(scope, receive, named)
        finally:
            if is_work:
                self.limits.close(visit)

    @staticmethod
    def _check_head(scope: Scope) -> None:
        headers = scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
            raise errors.HeadTooLarge(
                f"The request has {len(headers)} headers of {size} bytes; the limits are {MAX_HEADERS} and"
                f" {MAX_HEADER_BYTES}."
            )

    def _check_admin(self, path: str, headers: Headers) -> None:
        if not self._keys.has_admins or not _is_admin(path):
            return  # without an admin key there are no admin routes
        given = headers.getlist("authorization")
        if len(given) != 1 or self._keys.owner(given[0]) is None:
            raise errors.Unauthorized("This needs the admin key. Send it as 'Authorization: Bearer KEY'.")
        if not self._keys.is_admin(given[0]):
            raise errors.Forbidden("This needs the admin key.")

    def _identify(self, visit: Visit, headers: Headers) -> None:
        if not self._keys.are_needed:
            return
        given = headers.getlist("authorization")
        visit.key = self._keys.owner(given[0]) if len(given) == 1 else None
        if visit.key is None:
            words = "Incorrect API key provided." if given else "You didn't provide an API key."
            raise errors.Unauthorized(f"{words} Send it as 'Authorization: Bearer KEY'.")


def _is_admin(path: str) -> bool:
    return f"{path}/".startswith(f"{ADMIN_PATH}/")

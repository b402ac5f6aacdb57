"""The page at /: its files as they are, read once. It holds nothing secret; what it asks for needs a key."""

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import Request
from fastapi.responses import Response

FOLDER = Path(__file__).parent / "page_files"
INDEX = "index.html"
_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    # Nothing from elsewhere, nothing inline, in nobody's frame.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # asked again each time, answered by the tag
}


def _paths() -> dict[str, Path]:
    """URL path to file."""
    files = {file.name: file for file in sorted(FOLDER.iterdir()) if file.suffix in _TYPES}
    return {"/": files.pop(INDEX), **{f"/page/{name}": file for name, file in files.items()}}


_FILES = _paths()
PAGE_PATHS = frozenset(_FILES)  # what a browser loads before anybody has given a key


def page_endpoints() -> dict[str, Callable[[Request], Awaitable[Response]]]:
    """URL path to endpoint, for each file of the page."""
    return {path: _endpoint(file) for path, file in _FILES.items()}


def _endpoint(file: Path) -> Callable[[Request], Awaitable[Response]]:
    content = file.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = _HEADERS | {"etag": tag}

    async def serve(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=_TYPES[file.suffix], headers=headers)

    return serve

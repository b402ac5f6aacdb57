"""Exceptions become HTTP here and nowhere else: the status, OpenAI's error envelope, whether to retry."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from engine.errors import BadRequest, EngineDead, NotFound, Overloaded, ServeError, StepFailed

RETRY_AFTER_SECONDS = 5

log = logging.getLogger("farspan.server")


class BodyTooLarge(BadRequest):
    """The request's body passes the server's limit; it is not read to its end."""

    code = "request_too_large"


class WrongContentType(BadRequest):
    """Only JSON is read."""

    code = "unsupported_media_type"


class HeadTooLarge(BadRequest):
    """More headers, or longer ones, than any client of ours sends."""

    code = "headers_too_large"


class Unauthorized(ServeError):
    """No API key, or a wrong one."""

    code = "invalid_api_key"


class Forbidden(ServeError):
    """A good API key, for something else."""

    code = "permission_denied"


class QuotaExceeded(ServeError):
    """The caller's key has all that it may have; others may still be served."""

    code = "rate_limit_exceeded"


class TimedOut(ServeError):
    """The request took longer than its own limit."""

    code = "timeout"


# The first class that fits decides.
_STATUS: dict[type[ServeError], int] = {
    BodyTooLarge: 413,
    WrongContentType: 415,
    HeadTooLarge: 431,
    BadRequest: 400,
    NotFound: 404,
    TimedOut: 408,
    Unauthorized: 401,
    Forbidden: 403,
    QuotaExceeded: 429,
    Overloaded: 503,
    StepFailed: 500,
    EngineDead: 503,
}


def install(app: FastAPI) -> None:
    """Answer every error of an app in the envelope."""
    app.add_exception_handler(ServeError, _answer)
    app.add_exception_handler(HTTPException, _answer)
    app.add_exception_handler(Exception, _answer)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)


def envelope(error: Exception) -> dict[str, Any]:
    """{"error": {message, type, param, code}}: the body of an error reply, or of an error in a stream."""
    param = None
    match error:
        case ServeError():
            message, param, code = error.message, error.param, error.code
        case HTTPException(status_code=404):
            message, code = "There is nothing at this URL.", "unknown_url"
        case HTTPException(status_code=405):
            message, code = "This URL does not take this method.", "method_not_allowed"
        case HTTPException():
            message, code = str(error.detail), "http_error"
        case _:  # a mistake of ours: its words may hold paths, so they go to the log only
            message, code = "The server had an error while processing your request.", "internal_error"
    kind = "invalid_request_error" if _status(error) < 500 else "server_error"
    if isinstance(error, QuotaExceeded):
        kind = "rate_limit_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def in_stream(error: Exception) -> dict[str, Any]:
    """The envelope of an error that comes when the status has been sent."""
    if not isinstance(error, ServeError):
        log.error("a stream failed", exc_info=error)
    return envelope(error)


def _status(error: Exception) -> int:
    if isinstance(error, HTTPException):
        return error.status_code
    return next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)


def reply(error: Exception, **beside: Any) -> JSONResponse:
    """The reply to a request that failed before anything of it was sent; with more beside the envelope."""
    status = _status(error)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if status in (429, 503):
        headers["retry-after"] = str(RETRY_AFTER_SECONDS)
    elif isinstance(error, ServeError):
        headers["x-should-retry"] = "false"  # the same request would fail the same way
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, BodyTooLarge):
        headers["connection"] = "close"  # the rest of the body is still on its way
    return JSONResponse(envelope(error) | beside, status, headers)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    return reply(error)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    """The client left: the status is nginx's for that, and nobody reads it."""
    return Response(status_code=499)

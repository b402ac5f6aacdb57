"""What can go wrong while serving, as one tree. server/errors.py turns it into HTTP, and nothing else does.

ServeError
 ├─ BadRequest          400   the caller can fix it
 │   └─ PromptTooLong   400   context_length_exceeded
 ├─ NotFound            404   no such model or plan
 ├─ Overloaded          503   try again later (429 is a key's own quota)
 ├─ StepFailed          500   this request is lost, the engine lives
 └─ EngineDead          503   nothing will be served
"""


class ServeError(Exception):
    """Base of all: `code` is the OpenAI error code string, `param` the dotted path of the field to blame."""

    code = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class BadRequest(ServeError):
    """The caller can fix it; raised before the engine hears of the request."""

    code = "invalid_value"


class PromptTooLong(BadRequest):
    """Prompt and answer do not fit the context, or the cache can never hold them."""

    code = "context_length_exceeded"


class NotFound(ServeError):
    """No such model or plan."""

    code = "model_not_found"


class Overloaded(ServeError):
    """Full for the moment: the same request may succeed later."""

    code = "overloaded"


class StepFailed(ServeError):
    """A forward failed with this request in it; the engine goes on."""

    code = "engine_error"


class EngineDead(ServeError):
    """The engine process ended or was never ready."""

    code = "engine_unavailable"

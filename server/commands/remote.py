"""Remote: a running server as the commands see it. Every way to fail becomes words, with what to do next."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Self
from urllib.parse import urlsplit

import typer

from server.commands.exits import FAILED, REFUSED, UNREACHABLE

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS = 10.0  # an answer itself may take as long as it takes
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
REMEDIES = {  # by the code of an error
    "invalid_api_key": "give the server's key with --api-key or in FARSPAN_API_KEY",
    "context_length_exceeded": "shorten the text or the answer (--max-tokens), or serve with a larger"
    " --max-model-len or --rope-scaling",
    "overloaded": "try again later, or serve with more --max-open-requests and --max-queued-tokens",
    "rate_limit_exceeded": "wait until another request of this key has ended",
    "engine_unavailable": "if the model is still loading, wait; otherwise look at the server's log",
    "engine_error": "the server's log says why; other requests go on",
    "timeout": "ask for less, or allow more time",
}

Url = Annotated[
    str,
    typer.Option(envvar="FARSPAN_URL", help="Where the server listens.", rich_help_panel="Server"),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="FARSPAN_API_KEY",
        help="The server's key. Others can read it in the list of processes; the environment hides it.",
        show_default="none",
        show_envvar=True,
        rich_help_panel="Server",
    ),
]
DEFAULT_URL = "http://127.0.0.1:8000"


class Trouble(Exception):
    """It did not work. `code` is the exit code of the command."""

    def __init__(self, words: str, code: int = FAILED) -> None:
        super().__init__(words)
        self.code = code


class Remote:
    """One server, one key. Safe to use from several threads."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Trouble(f"{url!r} is no URL such as {DEFAULT_URL}", REFUSED)
        keys = (api_key or "").split()  # the server's own variable may hold several
        self._headers = {"authorization": f"Bearer {keys[0]}"} if keys else {}
        self._is_here = parts.hostname in LOOPBACK
        self._client = self._connected()

    def _connected(self) -> "httpx.Client":
        import httpx

        return httpx.Client(
            base_url=self.url,
            headers=self._headers,
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None),
            trust_env=not self._is_here,  # no proxy stands before one's own machine
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up on whatever is still answered."""
        self._client.close()

    def hang_up(self) -> None:
        """The same, and be ready for more: an interrupt may have come where no connection is let go."""
        self.close()
        self._client = self._connected()

    def get(self, path: str) -> Any:
        """The JSON of a reply."""
        with self._errors():
            return _content(self._client.get(path))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON of a reply."""
        with self._errors():
            return _content(self._client.post(path, json=body))

    @contextmanager
    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Iterator[Any]]:
        """The JSON of the events of a streamed reply. Leaving the block hangs up, and so ends the request."""
        with self._errors(), self._client.stream("POST", path, json=body) as response:
            if response.is_error:
                response.read()
            yield _events(_checked(response))

    def model(self) -> dict[str, Any]:
        """The one model that is served, with its plans."""
        listed = self.get("/v1/models")
        try:
            model: dict[str, Any] = listed["data"][0]
            return model | {"id": model["id"]}
        except (LookupError, TypeError) as error:
            raise Trouble(
                f"{self.url} answers, but lists no model: is it a server of the OpenAI API?"
            ) from error

    @contextmanager
    def _errors(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            words = f"no server answers at {self.url}; start one with `farspan serve`, or name it with --url"
            raise Trouble(words, UNREACHABLE) from error
        except (httpx.TransportError, httpx.InvalidURL) as error:
            words = f"the connection to {self.url} broke off ({error or type(error).__name__})"
            raise Trouble(f"{words}; see whether the server still runs, and ask again") from error


def _events(response: "httpx.Response") -> Iterator[Any]:
    """Up to [DONE]. A stream that ends without it was cut off."""
    for line in response.iter_lines():
        if not line.startswith("data: "):
            continue
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise _trouble(event["error"], 200)
        yield event
    raise Trouble("the answer broke off: the server closed the connection before its end; ask again")


def _checked(response: "httpx.Response") -> "httpx.Response":
    if not response.is_error:
        return response
    try:
        error = response.json()["error"]
    except (ValueError, LookupError, TypeError):
        error = {"message": f"{response.url} answered with status {response.status_code}", "code": None}
    raise _trouble(error, response.status_code)


def _content(response: "httpx.Response") -> Any:
    try:
        return _checked(response).json()
    except ValueError as error:
        raise Trouble(f"{response.url} answers, but not with JSON: is it the URL of an API?") from error


def _trouble(error: Any, status: int) -> Trouble:
    """The server's own words, and what to do next."""
    code = error.get("code") if isinstance(error, dict) else None
    message = str(error.get("message") if isinstance(error, dict) else error).rstrip(". ")
    remedy = REMEDIES.get(str(code))
    words = f"the server says: {message}" + (f"; {remedy}" if remedy else "")
    return Trouble(words, UNREACHABLE if code == "engine_unavailable" else FAILED)

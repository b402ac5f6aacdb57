"""Bad input is answered in the envelope before the engine hears of it, and the next request is served."""

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.chat_request import CHAT_NOTHING
from server.text_request import TEXT_NOTHING
from tests.server.bad_fields import CHAT, FIELDS, TEXT
from tests.server.builders import (
    MODEL,
    PATIENCE,
    FakeEngine,
    chat_body,
    events,
    http_server,
    say,
    text_body,
)

LIMIT = 100_000  # bytes of a body


@dataclass(frozen=True)
class Running:
    engine: FakeEngine
    client: httpx.Client


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    engine = FakeEngine(say(5, 6))
    with (
        http_server(engine, folder, max_body_bytes=LIMIT) as url,
        httpx.Client(base_url=url, timeout=PATIENCE) as client,
    ):
        yield Running(engine, client)


@pytest.fixture(autouse=True)
def nothing_heard(running: Running) -> None:
    running.engine.submitted.clear()


def refused(
    running: Running, response: httpx.Response, status: int, code: str, param: str | None = None
) -> str:
    """Check the reply, that the engine heard nothing, and that the next request is served; the message."""
    assert running.engine.submitted == [], "the engine heard of a bad request"
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error = body["error"]
    assert isinstance(error["message"], str) and error["message"]
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert len(response.content) < 2000
    after = running.client.post(CHAT, json=chat_body())
    assert after.status_code == 200, after.text
    assert len(running.engine.submitted) == 1
    running.engine.submitted.clear()
    message: str = error["message"]
    return message


@pytest.mark.parametrize("case", FIELDS)
def test_a_bad_field_is_refused_by_name(running: Running, case: str) -> None:
    path, changes, status, code, param = FIELDS[case]
    body = chat_body(**changes) if path == CHAT else text_body(**changes)
    refused(running, running.client.post(path, json=body), status, code, param)


BODIES = {
    "nothing": b"",
    "not JSON": b"model=tiny",
    "half of it": b'{"model": "tiny", "messages": [',
    "an array": b"[]",
    "null": b"null",
    "NaN": b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
    "Infinity": b'{"model": "tiny", "prompt": "a", "temperature": -Infinity}',
    "1e999": b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
    "not UTF-8": b'{"model": "\xff"}',
    "half a surrogate pair": rb'{"model": "tiny", "prompt": "\ud800"}',
    "ninety thousand brackets": b"[" * 90_000,
}


@pytest.mark.parametrize("case", BODIES)
def test_a_body_that_is_no_json_object_is_refused(running: Running, case: str) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    response = running.client.post(TEXT, content=BODIES[case], headers=headers)
    refused(running, response, 400, "invalid_json")


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_only_json_is_read(running: Running, kind: str) -> None:
    content = json.dumps(chat_body()).encode()
    response = running.client.post(CHAT, content=content, headers={"content-type": kind})
    refused(running, response, 415, "unsupported_media_type")


def test_a_large_body_is_refused_by_its_declared_size(running: Running) -> None:
    """The reply comes although not a byte of the body was sent."""
    host, port = running.client.base_url.host, running.client.base_url.port
    with socket.create_connection((host, port), PATIENCE) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"content-length: {2**40}\r\n\r\n".encode()
        )
        reply = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ")
    assert json.loads(body)["error"]["code"] == "request_too_large"


def test_a_large_body_of_undeclared_size_is_not_read_to_its_end(running: Running) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 1000 * LIMIT:
            sent += 10_000
            yield b"x" * 10_000

    response = running.client.post(CHAT, content=endless(), headers={"content-type": "application/json"})
    refused(running, response, 413, "request_too_large")
    assert sent < 1000 * LIMIT


def test_ten_thousand_mistakes_get_a_short_answer(running: Running) -> None:
    body = chat_body(messages=[{"role": "x" * 50}] * 1000)
    refused(running, running.client.post(CHAT, json=body), 400, "invalid_value", "messages.0.role")


def test_a_long_name_is_not_echoed(running: Running) -> None:
    name = "x" * 50_000
    for changes in ({"model": name}, {"plan": name}, {name: 1}, {"temperature": name}):
        response = running.client.post(CHAT, json=chat_body(**changes))
        assert response.status_code in (400, 404) and len(response.content) < 2000


@pytest.mark.parametrize(("method", "path", "status"), [("GET", CHAT, 405), ("POST", "/v1/models", 405)])
def test_a_wrong_method_is_refused_in_the_envelope(
    running: Running, method: str, path: str, status: int
) -> None:
    response = running.client.request(method, path)
    assert response.headers["allow"]
    refused(running, response, status, "method_not_allowed")


@pytest.mark.parametrize(
    "path", ["/index.html", "/v1", "/v1/chat/completions/", "//v1/completions", "/docs/", "/redoc"]
)
def test_a_wrong_url_is_refused_in_the_envelope(running: Running, path: str) -> None:
    refused(running, running.client.get(f"{running.client.base_url}{path}"), 404, "unknown_url")


def test_an_unknown_plan_names_the_loaded_ones(running: Running) -> None:
    response = running.client.post(CHAT, json=chat_body(plan="fast"))
    assert "sparse, dense" in refused(running, response, 404, "plan_not_found", "plan")


def test_an_unknown_parameter_names_the_nearest_one(running: Running) -> None:
    response = running.client.post(CHAT, json=chat_body(max_token=5))
    message = refused(running, response, 400, "unsupported_parameter", "max_token")
    assert "'max_tokens'" in message


def test_too_long_a_request_is_refused_in_openais_words(running: Running) -> None:
    response = running.client.post(TEXT, json=text_body(prompt=[5] * 200, max_tokens=100))
    message = refused(running, response, 400, "context_length_exceeded", "prompt")
    assert message.startswith(
        "This model's maximum context length is 256 tokens. However, you requested 300 tokens"
        " (200 in the prompt, 100 in the completion)."
    )
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(("path", "nothing"), [(CHAT, CHAT_NOTHING), (TEXT, TEXT_NOTHING)])
def test_parameters_that_ask_for_nothing_are_accepted(
    running: Running, path: str, nothing: dict[str, tuple[Any, ...]]
) -> None:
    body = chat_body() if path == CHAT else text_body()
    for name, values in nothing.items():
        for value in (None, *values):
            response = running.client.post(path, json=body | {name: value})
            assert response.status_code == 200, (name, value, response.text)


@pytest.mark.parametrize("name", sorted(CHAT_NOTHING))
def test_parameters_that_ask_for_something_unserved_are_refused(running: Running, name: str) -> None:
    response = running.client.post(CHAT, json=chat_body(**{name: "something"}))
    refused(running, response, 400, "unsupported_parameter", name)


def test_a_bad_stream_request_is_refused_with_its_status(running: Running) -> None:
    response = running.client.post(CHAT, json=chat_body(stream=True, temperature=9))
    refused(running, response, 400, "invalid_value", "temperature")


def test_the_largest_request_that_fits_is_served(running: Running) -> None:
    response = running.client.post(TEXT, json=text_body(prompt=[5] * 200, max_tokens=56, model=MODEL))
    assert response.status_code == 200, response.text
    assert events(running.client.post(TEXT, json=text_body(prompt=[[299]], stream=True)).text)

"""A stream opens at once, stays alive while silent, and its request ends when the client leaves."""

import json
import socket
from pathlib import Path

import httpx
import pytest

from engine.errors import EngineDead
from server.streaming import KEEP_ALIVE
from tests.server.builders import (
    PATIENCE,
    FakeEngine,
    chat_body,
    events,
    http_server,
    say,
    text_body,
    then,
    until,
)

CHAT = "/v1/chat/completions"
SILENT = then(say())  # says nothing and ends without a reason
HANGING = then(say(), None)


def test_headers_and_comments_come_while_the_engine_is_silent(folder: Path) -> None:
    engine = FakeEngine(HANGING)
    with (
        http_server(engine, folder, sse_keep_alive_interval=0.01) as url,
        httpx.stream("POST", url + CHAT, json=chat_body(stream=True), timeout=PATIENCE) as response,
    ):
        assert response.status_code == 200
        received = b""
        for part in response.iter_bytes():
            received += part
            if len(received) >= 5 * len(KEEP_ALIVE):
                break
    assert received.startswith(KEEP_ALIVE * 5)


def test_comments_stop_when_events_come(folder: Path) -> None:
    engine = FakeEngine(say(*[5] * 50))
    with http_server(engine, folder, sse_keep_alive_interval=60) as url:
        text = httpx.post(url + CHAT, json=chat_body(stream=True), timeout=PATIENCE).text
    assert ": keep-alive" not in text


@pytest.mark.parametrize("said", [(), (5, 6)])
@pytest.mark.parametrize("interval", [0.01, 60])
def test_a_client_that_leaves_a_stream_aborts_its_request(
    folder: Path, said: tuple[int, ...], interval: float
) -> None:
    """Whether or not anything is being written at that moment."""
    engine = FakeEngine(then(say(*said), None))
    with http_server(engine, folder, sse_keep_alive_interval=interval) as url:
        with httpx.stream("POST", url + CHAT, json=chat_body(stream=True), timeout=PATIENCE):
            until(lambda: engine.submitted)
        assert engine.abort_heard.wait(PATIENCE)
        assert engine.aborted == [engine.submitted[0].request_id]


def test_a_client_that_leaves_without_streaming_aborts_its_request(folder: Path) -> None:
    engine = FakeEngine(HANGING)
    with http_server(engine, folder) as url:
        host, port = httpx.URL(url).host, httpx.URL(url).port
        body = json.dumps(text_body()).encode()
        with socket.create_connection((host, port)) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                + f"content-length: {len(body)}\r\n\r\n".encode()
                + body
            )
            until(lambda: engine.submitted)
        assert engine.abort_heard.wait(PATIENCE)
        engine.script = say(5)
        assert httpx.post(f"{url}/v1/completions", json=text_body(), timeout=PATIENCE).status_code == 200
    assert len(engine.aborted) == 1


def test_a_client_that_leaves_while_sending_its_body_disturbs_nobody(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine(say(5))
    with http_server(engine, folder) as url:
        with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port)) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b'content-length: 1000\r\n\r\n{"model"'
            )
        assert httpx.post(url + CHAT, json=chat_body(), timeout=PATIENCE).status_code == 200
    assert len(engine.submitted) == 1
    assert not caplog.records


def test_a_finished_request_is_not_aborted(folder: Path) -> None:
    engine = FakeEngine(say(5, 6))
    with http_server(engine, folder) as url:
        for stream in (False, True):
            httpx.post(url + CHAT, json=chat_body(stream=stream), timeout=PATIENCE)
    assert len(engine.submitted) == 2 and engine.aborted == []


def test_a_hundred_streams_at_once_get_each_its_own_answer(folder: Path) -> None:
    """And the server has no task left afterwards."""
    engine = FakeEngine(say(*range(60, 90)))
    with http_server(engine, folder, sse_keep_alive_interval=0.01) as url:
        with httpx.Client(timeout=PATIENCE, limits=httpx.Limits(max_connections=200)) as client:
            streams = []
            for _ in range(100):
                request = client.build_request("POST", url + CHAT, json=chat_body(stream=True))
                streams.append(client.send(request, stream=True))
            texts = {stream.read().split(b'"id":"')[1].split(b'"')[0] for stream in streams}
        assert len(texts) == 100


def test_an_engine_that_dies_before_the_first_token_ends_the_stream_clearly(folder: Path) -> None:
    engine = FakeEngine(then(say(), EngineDead("the engine process ended with code -9")))
    with http_server(engine, folder) as url:
        text = httpx.post(url + CHAT, json=chat_body(stream=True), timeout=PATIENCE).text
    first, second, end = text.split("\n\n")
    assert json.loads(first.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    assert (second, end) == ("data: [DONE]", "")


def test_an_engine_that_falls_silent_for_good_is_an_error_not_an_empty_answer(folder: Path) -> None:
    engine = FakeEngine(SILENT)
    with http_server(engine, folder) as url:
        response = httpx.post(url + CHAT, json=chat_body(), timeout=PATIENCE)
    assert response.status_code == 500 and response.json()["error"]["code"] == "engine_error"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_every_chunk_says_the_usage_so_far_where_asked(folder: Path, path: str) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    body = chat_body(**options) if "chat" in path else text_body(**options)
    with http_server(FakeEngine(say(70, 71, 72)), folder) as url:
        chunks = events(httpx.post(url + path, json=body, timeout=PATIENCE).text)
    said = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert said == sorted(said) and {1, 2, 3} <= set(said) and said[-1] == 3
    assert len({chunk["usage"]["prompt_tokens"] for chunk in chunks}) == 1

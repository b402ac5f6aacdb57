"""Logs and traces of requests: every ended one, once, with its times and ids, and nothing of its text."""

import gzip
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from configs.errors import ConfigError
from configs.logs import REQUESTS
from configs.schema import ServerConfig
from engine.errors import StepFailed
from server import tracing
from server.metrics import Metrics
from server.record import RequestRecord, log_request
from server.tracing import Tracer, check_tracing
from tests.server.builders import (
    MODEL,
    PATIENCE,
    FakeEngine,
    chat_body,
    http_server,
    say,
    text_body,
    then,
    until,
)

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "the quick secret"


@contextmanager
def collector() -> Iterator[tuple[str, list[Any]]]:
    """An OTLP endpoint, and the spans that it got."""
    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            """Tests print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1/traces", spans
        finally:
            server.shutdown()
            thread.join(PATIENCE)


def listening(engine: FakeEngine, *listeners: Any) -> Metrics:
    return Metrics(MODEL, engine, on_end=listeners)


def by_name(spans: list[Any]) -> dict[str, Any]:
    return {span.name: span for span in spans}


def plain(span: Any) -> dict[str, Any]:
    """Attributes as Python has them."""

    def value(found: Any) -> Any:
        kind = found.WhichOneof("value")
        return tuple(map(value, found.array_value.values)) if kind == "array_value" else getattr(found, kind)

    return {attribute.key: value(attribute.value) for attribute in span.attributes}


def test_a_request_is_a_span_below_its_clients_with_its_phases_inside(folder: Path) -> None:
    engine = FakeEngine(say(5, 6, 7))
    with collector() as (endpoint, spans):
        tracer = Tracer(endpoint, MODEL)
        with http_server(engine, folder, metrics=listening(engine, tracer.trace)) as url:
            headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "x-request-id": "mine"}
            reply = httpx.post(url + CHAT, json=chat_body(), headers=headers, timeout=PATIENCE).json()
        tracer.close()
    found = by_name(spans)
    assert set(found) == {f"chat {MODEL}", "queue", "prefill", "decode"}
    span = found[f"chat {MODEL}"]
    assert span.trace_id.hex() == TRACE and span.parent_span_id.hex() == SPAN
    for name in ("queue", "prefill", "decode"):
        assert found[name].parent_span_id == span.span_id
        assert span.start_time_unix_nano <= found[name].start_time_unix_nano
        assert found[name].end_time_unix_nano <= span.end_time_unix_nano
    attributes = plain(span)
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.request.model"] == MODEL
    assert attributes["gen_ai.response.id"] == reply["id"]
    assert attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert attributes["gen_ai.usage.output_tokens"] == 3
    assert attributes["gen_ai.usage.input_tokens"] == reply["usage"]["prompt_tokens"]
    assert attributes["farspan.plan"] == "sparse" and attributes["farspan.read_fraction"] == 0.25
    assert attributes["farspan.x_request_id"] == "mine"
    assert "error.type" not in attributes


def test_a_failed_request_is_a_failed_span(folder: Path) -> None:
    engine = FakeEngine(lambda submit: [StepFailed("no")])
    with collector() as (endpoint, spans):
        tracer = Tracer(endpoint, MODEL)
        with http_server(engine, folder, metrics=listening(engine, tracer.trace)) as url:
            httpx.post(url + TEXT, json=text_body(), timeout=PATIENCE)
        tracer.close()
    found = by_name(spans)
    span = found[f"text_completion {MODEL}"]
    assert span.status.code == 2 and plain(span)["error.type"] == "engine_error"
    assert set(found) == {f"text_completion {MODEL}", "queue"}, "its prompt was never computed"


def test_an_endpoint_that_is_not_there_costs_a_line_in_the_log_and_no_request(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "1")
    engine = FakeEngine(say(5))
    tracer = Tracer("http://127.0.0.1:1/v1/traces", MODEL)
    with http_server(engine, folder, metrics=listening(engine, tracer.trace)) as url:
        assert httpx.post(url + CHAT, json=chat_body(), timeout=PATIENCE).status_code == 200
    tracer.close()
    assert "Failed to export spans batch" in caplog.text


def test_traces_without_the_packages_that_send_them_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_tracing(ServerConfig())
    asked = ServerConfig(otlp_traces_endpoint="http://127.0.0.1:4318/v1/traces")
    check_tracing(asked)
    monkeypatch.setattr(tracing, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'farspan\[otel\]'"):
        check_tracing(asked)


def test_every_ended_request_is_one_line_without_its_text(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine(say(5, 6, 7))
    records: list[RequestRecord] = []
    with (
        caplog.at_level(logging.INFO, REQUESTS),
        http_server(engine, folder, metrics=listening(engine, log_request, records.append)) as url,
    ):
        body = chat_body(messages=[{"role": "user", "content": SECRET}])
        httpx.post(url + CHAT, json=body, headers={"x-request-id": "mine"}, timeout=PATIENCE)
        engine.script = then(say(5), StepFailed("no"))
        httpx.post(url + CHAT, json=body | {"stream": True}, timeout=PATIENCE)
        httpx.post(url + CHAT, json=body | {"temperature": 9}, timeout=PATIENCE)  # refused: never a request
        until(lambda: len(records) == 2)
    lines = [record for record in caplog.records if record.name == REQUESTS]
    first, second = (line.__dict__["request"] for line in lines)
    assert first["x_request_id"] == "mine" and first["plan"] == "sparse" and first["answer_tokens"] == 3
    assert first["finish_reason"] == "length" and first["error"] is None
    assert second["finish_reason"] == "error" and second["error"] == "engine_error"
    assert 0 <= first["first_token_seconds"] <= first["seconds"]
    assert not any(SECRET in str(line.__dict__) for line in lines)

"""Tracer: a span per request and its phases, by OTLP, named as OpenTelemetry's GenAI conventions say."""

from importlib.util import find_spec
from typing import Any

from configs.errors import ConfigError
from configs.schema import ServerConfig
from server.record import RequestRecord
from server.version import farspan_version

_EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"


def check_tracing(config: ServerConfig) -> None:
    """Raises ConfigError where traces are asked for and the packages that send them are missing."""
    if config.otlp_traces_endpoint is None:
        return
    try:
        found = find_spec("opentelemetry.sdk") is not None and find_spec(_EXPORTER) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise ConfigError(
            "server.otlp_traces_endpoint: the packages that send traces are missing;"
            " pip install 'farspan[otel]'"
        )


class Tracer:
    """Spans are made when a request has ended, from its times; a thread of the SDK sends them in batches."""

    def __init__(self, endpoint: str, model_name: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create({"service.name": "farspan", "service.version": farspan_version()})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("farspan", farspan_version())
        self._model_name = model_name

    def trace(self, record: RequestRecord) -> None:
        """One request, with what it waited, read its prompt and answered as children."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract({"traceparent": record.job.traceparent})
        span = self._tracer.start_span(
            f"{record.operation} {self._model_name}",
            context=parent,
            kind=SpanKind.SERVER,
            start_time=_nanoseconds(record.arrived),
            attributes=attributes(record, self._model_name),
        )
        if record.error is not None:
            span.set_status(Status(StatusCode.ERROR, record.error))
        inside = set_span_in_context(span)
        for name, first, last in phases(record):
            child = self._tracer.start_span(name, context=inside, start_time=_nanoseconds(first))
            child.end(_nanoseconds(last))
        span.end(_nanoseconds(record.arrived + record.seconds))

    def close(self) -> None:
        """Send what is left. Takes as long as the endpoint needs, within the exporter's own limit."""
        self._provider.shutdown()


def attributes(record: RequestRecord, model_name: str) -> dict[str, Any]:
    """Of the request's span. What is not known is left out."""
    submit, cost = record.job.submit, record.cost
    sampling = submit.sampling
    found: dict[str, Any] = {
        "gen_ai.operation.name": record.operation,
        "gen_ai.provider.name": "farspan",
        "gen_ai.request.model": model_name,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.choice.count": submit.choices,
        "gen_ai.response.id": submit.request_id,
        "gen_ai.response.model": model_name,
        "gen_ai.response.finish_reasons": (record.finish_reason.value,),
        "gen_ai.usage.input_tokens": submit.prompt_length,
        "gen_ai.usage.output_tokens": record.num_tokens,
        "error.type": record.error,
        "farspan.x_request_id": record.job.client_id,
        "farspan.plan": record.job.plan.name,
        "farspan.plan_digest": record.job.plan.digest,
        "farspan.first_token_seconds": record.first_token_seconds,
    }
    if cost is not None:
        found |= {
            "gen_ai.usage.cache_read.input_tokens": cost.cached_tokens,
            "farspan.read_fraction": cost.prefill_read_fraction,
            "farspan.attention_recall": cost.attention_recall,
            "farspan.kv_tokens_kept": cost.kv_tokens_kept,
            "farspan.kv_bytes": cost.kv_bytes,
        }
    return {name: value for name, value in found.items() if value is not None}


def phases(record: RequestRecord) -> list[tuple[str, float, float]]:
    """(name, begin, end) in Unix seconds, of those that the request came to."""
    if record.cost is None:
        return [("queue", record.arrived, record.arrived + record.seconds)]
    end = record.arrived + record.seconds
    answering = min(end, record.arrived + (record.first_token_seconds or record.seconds))
    reading = max(record.arrived, answering - record.cost.prefill_seconds)
    return [("queue", record.arrived, reading), ("prefill", reading, answering), ("decode", answering, end)]


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)

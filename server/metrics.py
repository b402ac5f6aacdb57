"""What operators see at /metrics: Prometheus series, named as vLLM does where the meaning is the same."""

import time
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.client import Engine
from engine.messages import Cost, FinishReason, Outputs
from server.prepare import Job

# Prefill of a long prompt takes minutes, so the tails reach further than usual (vLLM's do, too).
_TTFT_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
_TOKEN_SECONDS = (
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
_PHASE_SECONDS = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960, 1920, 7680),
)
_LENGTHS = tuple(factor * 10**power for power in range(6) for factor in (1, 2, 5)) + (1_000_000,)
_STEP_TOKENS = tuple(2**power for power in (0, *range(3, 15)))
_FRACTIONS = (0.01, 0.02, 0.05, *(step / 10 for step in range(1, 11)))
_RECALLS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 0.995, 1)


class Metrics:
    """Owns the registry. Levels are read from the engine when scraped; requests are counted as they end."""

    def __init__(self, model_name: str, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineState(model_name, engine))
        self.model_name = model_name
        self._steps = 0  # seen so far

        def histogram(name: str, words: str, buckets: Sequence[float]) -> Histogram:
            family = Histogram(
                f"farspan:{name}", words, ["model_name"], buckets=buckets, registry=self.registry
            )
            return family.labels(model_name)

        def counter(name: str, words: str, label: str) -> Counter:
            return Counter(f"farspan:{name}", words, ["model_name", label], registry=self.registry)

        self.requests = counter("requests", "Requests by plan.", "plan")
        self.success = counter("request_success", "Ended requests by reason.", "finished_reason")
        self.ttft = histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _TTFT_SECONDS
        )
        self.between = histogram(
            "inter_token_latency_seconds", "Between two tokens of a request.", _TOKEN_SECONDS
        )
        self.latency = histogram("e2e_request_latency_seconds", "From arrival to the end.", _PHASE_SECONDS)
        self.queued = histogram("request_queue_time_seconds", "Waiting for admission.", _PHASE_SECONDS)
        self.prefilled = histogram("request_prefill_time_seconds", "Computing the prompt.", _PHASE_SECONDS)
        self.prompt_length = histogram("request_prompt_tokens", "Prompt tokens of a request.", _LENGTHS)
        self.answer_length = histogram(
            "request_generation_tokens", "Generated tokens of a request.", _LENGTHS
        )
        self.step_tokens = histogram("iteration_tokens_total", "Tokens of one engine step.", _STEP_TOKENS)
        self.read_fraction = histogram(
            "prefill_read_fraction", "Keys read x query rows over causal cells, of a prompt.", _FRACTIONS
        )
        self.kept_fraction = histogram(
            "kept_fraction", "Prompt tokens kept per row at the end of prefill, over all.", _FRACTIONS
        )
        self.recall = histogram("attention_recall", "Mean sampled attention recall of a prompt.", _RECALLS)

    def on_step(self, outputs: Outputs) -> None:
        """Called with everything the engine says."""
        if outputs.stats.steps > self._steps:  # outputs may come without a step: an abort's, for example
            self._steps = outputs.stats.steps
            self.step_tokens.observe(outputs.stats.step_tokens)

    def open(self, job: Job) -> "RequestMeter":
        """Follow one request from now to its end."""
        self.requests.labels(self.model_name, job.plan.name).inc()
        return RequestMeter(self, job)

    def exposition(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)


class RequestMeter:
    """The times and counts of one request."""

    def __init__(self, metrics: Metrics, job: Job) -> None:
        self._metrics = metrics
        self._job = job
        self._num_tokens = 0
        self._last: float | None = None  # when the newest tokens came

    def tokens(self, count: int, cost: Cost | None) -> None:
        """New tokens came; `cost` comes with the first."""
        now = time.monotonic()
        if cost is not None:
            self._observe_prompt(cost)
        if count == 0:
            return
        if self._last is None:
            self._metrics.ttft.observe(now - self._job.arrived)
            count -= 1
            self._num_tokens += 1
        for _ in range(count):
            self._metrics.between.observe((now - (self._last or now)) / count)
        self._num_tokens += count
        self._last = now

    def close(self, reason: FinishReason) -> None:
        """The request ended."""
        metrics = self._metrics
        metrics.success.labels(metrics.model_name, reason.value).inc()
        metrics.latency.observe(time.monotonic() - self._job.arrived)
        metrics.answer_length.observe(self._num_tokens)

    def _observe_prompt(self, cost: Cost) -> None:
        metrics = self._metrics
        metrics.prompt_length.observe(cost.kv_tokens_total)
        metrics.queued.observe(cost.queue_seconds)
        metrics.prefilled.observe(cost.prefill_seconds)
        metrics.read_fraction.observe(cost.prefill_read_fraction)
        metrics.kept_fraction.observe(cost.kv_tokens_kept / cost.kv_tokens_total)
        if cost.attention_recall is not None:
            metrics.recall.observe(cost.attention_recall)


class _EngineState(Collector):
    """Levels and counts that the engine reports after each step."""

    def __init__(self, model_name: str, engine: Engine) -> None:
        self._model_name = model_name
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats
        held = stats.pages_borrowed + stats.pages_private
        num_pages = self._engine.card.num_pages
        yield self._gauge("num_requests_running", "Requests in the running batch.", stats.running)
        yield self._gauge("num_requests_waiting", "Requests waiting for admission.", stats.waiting)
        usage = held / num_pages if num_pages else 0.0
        yield self._gauge("kv_cache_usage_perc", "Pages held by sequences over all pages, 0 to 1.", usage)
        yield self._gauge("kv_cache_bytes", "Bytes of the pages that sequences hold.", stats.kv_bytes)
        yield self._counter("prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queries)
        yield self._counter("prefix_cache_hits", "Prompt tokens not computed again.", stats.prefix_hits)
        pages = GaugeMetricFamily("farspan:kv_pages", "Pages by state.", labels=["model_name", "state"])
        for state in ("free", "cached", "borrowed", "private"):
            pages.add_metric([self._model_name, state], getattr(stats, f"pages_{state}"))
        yield pages

    def _gauge(self, name: str, words: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"farspan:{name}", words, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, words: str, value: float) -> Metric:
        family = CounterMetricFamily(f"farspan:{name}", words, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

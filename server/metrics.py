"""What operators see at /metrics: Prometheus series, named as vLLM does where the meaning is the same."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from configs.model import PAGE_SIZE
from engine.client import Engine
from engine.messages import Outputs
from server.meter import RequestMeter
from server.prepare import Job
from server.record import RequestRecord

OURS = "farspan"
OF_VLLM = frozenset(  # what means the same there; --metrics-prefix gives these its prefix
    {
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"),
        *("prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits"),
        *("request_success", "admission_rejections", "iteration_tokens_total", "num_preemptions"),
        *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
        *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
        *("request_inference_time_seconds", "request_time_per_output_token_seconds"),
        *("request_prompt_tokens", "request_generation_tokens", "request_prefill_kv_computed_tokens"),
        *("request_params_n", "request_params_max_tokens"),
    }
)

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
_COUNTS = (1, 2, 5, 10, 20)
_CONTEXTS = tuple(4**power for power in range(5, 11))  # tokens: 1,024 to 1,048,576
_RECALLS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 0.995, 1)


def full_name(name: str, prefix: str) -> str:
    """The name on the wire, without the suffixes that Prometheus adds."""
    return f"{prefix if name in OF_VLLM else OURS}:{name}"


def context_label(tokens: int) -> str:
    """The shortest of the contexts by which chunks are told apart that holds so many tokens."""
    place = bisect_left(_CONTEXTS, tokens)
    return str(_CONTEXTS[place]) if place < len(_CONTEXTS) else "more"


class Metrics:
    """Owns the registry. Levels are read from the engine when scraped; requests are counted as they end."""

    def __init__(
        self,
        model_name: str,
        engine: Engine,
        prefix: str = OURS,
        on_end: Iterable[Callable[[RequestRecord], None]] = (),
    ) -> None:
        """`prefix` is what names begin with that vLLM has, too; `on_end` hears of every ended request."""
        self.registry = CollectorRegistry()
        self.registry.register(_EngineState(model_name, engine, prefix))
        self.model_name = model_name
        self._on_end = tuple(on_end)
        self._steps = 0  # seen so far

        def histogram(name: str, words: str, buckets: Sequence[float]) -> Histogram:
            family = Histogram(
                full_name(name, prefix), words, ["model_name"], buckets=buckets, registry=self.registry
            )
            return family.labels(model_name)

        def counter(name: str, words: str, label: str) -> Counter:
            name = full_name(name, prefix)
            return Counter(name, words, ["model_name", label], registry=self.registry)

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
        self.recall_p5 = histogram(
            "attention_recall_p5", "5th percentile of a prompt's sampled attention recall.", _RECALLS
        )
        self.decoded = histogram("request_decode_time_seconds", "First to last token.", _PHASE_SECONDS)
        self.inferred = histogram(
            "request_inference_time_seconds", "From admission to the last token.", _PHASE_SECONDS
        )
        self.per_token = histogram(
            "request_time_per_output_token_seconds", "Mean time between tokens, by request.", _TOKEN_SECONDS
        )
        self.computed = histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens not taken from the prefix cache.", _LENGTHS
        )
        self.choices = histogram("request_params_n", "Choices that a request asks for.", _COUNTS)
        self.answer_limit = histogram("request_params_max_tokens", "Longest answer allowed.", _LENGTHS)
        self.rejections = counter("admission_rejections", "Requests refused for lack of room.", "reason")
        self.fallbacks = counter("dense_fallbacks", "Prompts that a sparse plan read densely.", "reason")
        self._chunks = Histogram(
            full_name("prefill_chunk_seconds", prefix),
            "Steps with a chunk of a prompt, by tokens of context at its end.",
            ["model_name", "context"],
            buckets=_TOKEN_SECONDS,
            registry=self.registry,
        )

    def on_step(self, outputs: Outputs) -> None:
        """Called with everything the engine says."""
        if outputs.stats.steps not in (0, self._steps):  # outputs may come without a step: an abort's do
            self._steps = outputs.stats.steps
            self.step_tokens.observe(outputs.stats.step_tokens)
            if outputs.stats.step_context:
                context = context_label(outputs.stats.step_context)
                self._chunks.labels(self.model_name, context).observe(outputs.stats.step_seconds)

    def open(self, job: Job) -> "RequestMeter":
        """Follow one request from now to its end."""
        self.requests.labels(self.model_name, job.plan.name).inc()
        return RequestMeter(self, job)

    def refused(self, reason: str) -> None:
        """A request found no room: the server is full, too much waits, or its key has its share."""
        self.rejections.labels(self.model_name, reason).inc()

    def ended(self, record: RequestRecord) -> None:
        """A request ended."""
        for hear in self._on_end:
            hear(record)

    def exposition(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)


class _EngineState(Collector):
    """Levels and counts that the engine reports after each step."""

    def __init__(self, model_name: str, engine: Engine, prefix: str) -> None:
        self._model_name = model_name
        self._engine = engine
        self._prefix = prefix

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats
        held = stats.pages_borrowed + stats.pages_private
        num_pages = self._engine.card.num_pages
        yield self._gauge("num_requests_running", "Requests in the running batch.", stats.running)
        yield self._gauge("num_requests_waiting", "Requests waiting for admission.", stats.waiting)
        yield self._counter("host_cache_hits", "Prompt tokens copied back from the host.", stats.host_hits)
        yield self._gauge("num_requests_swapped", "Requests that gave way, on the host.", stats.swapped)
        yield self._gauge("host_pages", "Pages of the host tier that are taken.", stats.pages_host)
        usage = held / num_pages if num_pages else 0.0
        yield self._gauge("kv_cache_usage_perc", "Pages held by sequences over all pages, 0 to 1.", usage)
        yield self._gauge("kv_cache_bytes", "Bytes of the pages that sequences hold.", stats.kv_bytes)
        yield self._counter("prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queries)
        yield self._counter("prefix_cache_hits", "Prompt tokens not computed again.", stats.prefix_hits)
        engine = self._engine
        yield self._counter("engine_restarts", "Times the engine process was started again.", engine.restarts)
        yield self._counter("requests_replayed", "Requests that went on in another one.", engine.replays)
        yield self._counter("num_preemptions", "Sequences swapped out to the host.", stats.swaps_out)
        yield self._cache_config()
        pages = GaugeMetricFamily("farspan:kv_pages", "Pages by state.", labels=["model_name", "state"])
        for state in ("free", "cached", "borrowed", "private"):
            pages.add_metric([self._model_name, state], getattr(stats, f"pages_{state}"))
        yield pages
        swaps = CounterMetricFamily("farspan:swaps", "Sequences swapped.", labels=["model_name", "direction"])
        swaps.add_metric([self._model_name, "out"], stats.swaps_out)
        swaps.add_metric([self._model_name, "in"], stats.swaps_in)
        yield swaps

    def _cache_config(self) -> Metric:
        """A gauge of 1 whose labels say how the cache is laid out; routers read it under vLLM's names."""
        card = self._engine.card
        labels = {
            "model_name": self._model_name,
            "block_size": str(PAGE_SIZE),
            "num_gpu_blocks": str(card.num_pages),
            "page_bytes": str(card.page_bytes),
            "cache_dtype": card.dtype if card.cache_dtype == "auto" else card.cache_dtype,
        }
        name = full_name("cache_config_info", self._prefix)
        family = GaugeMetricFamily(name, "How the cache is laid out.", labels=list(labels))
        family.add_metric(list(labels.values()), 1)
        return family

    def _gauge(self, name: str, words: str, value: float) -> Metric:
        family = GaugeMetricFamily(full_name(name, self._prefix), words, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, words: str, value: float) -> Metric:
        family = CounterMetricFamily(full_name(name, self._prefix), words, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

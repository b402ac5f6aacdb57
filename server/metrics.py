"""What operators see at /metrics: Prometheus series, named as vLLM does where the meaning is the same."""

from bisect import bisect_left
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, generate_latest

from engine.client import Engine
from engine.messages import Outputs
from server.engine_series import EngineSeries
from server.meter import RequestMeter
from server.prepare import Job
from server.record import RequestRecord
from server.request_series import TOKEN_SECONDS, RequestSeries
from server.series import OURS, Series

_STEP_TOKENS = tuple(2**power for power in (0, *range(3, 15)))
_CONTEXTS = tuple(4**power for power in range(5, 11))  # tokens: 1,024 to 1,048,576


def context_label(tokens: int) -> str:
    """The shortest of the contexts by which chunks are told apart that holds so many tokens."""
    place = bisect_left(_CONTEXTS, tokens)
    return str(_CONTEXTS[place]) if place < len(_CONTEXTS) else "more"


class Metrics:
    """Owns the series. Levels are read from the engine when scraped; requests are counted as they end."""

    def __init__(
        self,
        model_name: str,
        engine: Engine,
        prefix: str = OURS,
        on_end: Iterable[Callable[[RequestRecord], None]] = (),
    ) -> None:
        """`prefix` is what names begin with that vLLM has, too; `on_end` hears of every ended request."""
        self.model_name = model_name
        self._on_end = tuple(on_end)
        self._steps = 0  # seen so far
        self._series = series = Series(model_name, prefix)
        series.registry.register(EngineSeries(series, engine))
        self._requests = RequestSeries(series)
        self._step_tokens = series.histogram(
            "iteration_tokens_total", "Tokens of one engine step.", _STEP_TOKENS
        )
        self._chunks = series.histograms(
            "prefill_chunk_seconds",
            "Steps with a chunk of a prompt, by tokens of context at its end.",
            "context",
            TOKEN_SECONDS,
        )

    @property
    def registry(self) -> CollectorRegistry:
        return self._series.registry

    def on_step(self, outputs: Outputs) -> None:
        """Called with everything the engine says."""
        stats = outputs.stats
        if stats.steps not in (0, self._steps):  # outputs may come without a step: an abort's do
            self._steps = stats.steps
            self._step_tokens.observe(stats.step_tokens)
            if stats.step_context:
                self._chunks(context_label(stats.step_context)).observe(stats.step_seconds)

    def open(self, job: Job) -> RequestMeter:
        """Follow one request from now to its end."""
        self._requests.opened(job.plan.name).inc()
        return RequestMeter(self._requests, job, self._ended)

    def refused(self, reason: str) -> None:
        """A request found no room: the server is full, too much waits, or its key has its share."""
        self._requests.refused(reason).inc()

    def exposition(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)

    def _ended(self, record: RequestRecord) -> None:
        for hear in self._on_end:
            hear(record)

"""EngineSeries: levels and counts that the engine reports after each step, read when they are scraped."""

from collections.abc import Iterable

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from configs.model import PAGE_SIZE
from engine.client import Engine
from server.series import Series


class EngineSeries(Collector):
    """Of what the engine said last."""

    def __init__(self, series: Series, engine: Engine) -> None:
        self._series = series
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        yield from self._load()
        yield from self._tokens()
        yield from self._pages()
        yield from self._moves()

    def _load(self) -> Iterable[Metric]:
        """What runs and waits, and what befell the process."""
        engine, stats = self._engine, self._engine.stats
        yield self._gauge("num_requests_running", "Requests in the running batch.", stats.running)
        yield self._gauge("num_requests_waiting", "Requests waiting for admission.", stats.waiting)
        yield self._gauge("num_requests_swapped", "Requests that gave way, on the host.", stats.swapped)
        yield self._counter("engine_restarts", "Times the engine process was started again.", engine.restarts)
        yield self._counter("requests_replayed", "Requests that went on in another one.", engine.replays)

    def _tokens(self) -> Iterable[Metric]:
        stats = self._engine.stats
        yield self._counter("prompt_tokens", "Tokens of prompts computed to their end.", stats.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queries)
        yield self._counter("prefix_cache_hits", "Prompt tokens not computed again.", stats.prefix_hits)
        yield self._counter("host_cache_hits", "Prompt tokens copied back from the host.", stats.host_hits)

    def _pages(self) -> Iterable[Metric]:
        """Who has the memory for keys and values."""
        stats, num_pages = self._engine.stats, self._engine.card.num_pages
        held = stats.pages_borrowed + stats.pages_private
        usage = held / num_pages if num_pages else 0.0
        yield self._gauge("kv_cache_usage_perc", "Pages held by sequences over all pages, 0 to 1.", usage)
        yield self._gauge("kv_cache_bytes", "Bytes of the pages that sequences hold.", stats.kv_bytes)
        yield self._gauge("host_pages", "Pages of the host tier that are taken.", stats.pages_host)
        pages = GaugeMetricFamily(self._name("kv_pages"), "Pages by state.", labels=["model_name", "state"])
        for state in ("free", "cached", "borrowed", "private"):
            pages.add_metric([self._series.model_name, state], getattr(stats, f"pages_{state}"))
        yield pages
        yield self._cache_config()

    def _moves(self) -> Iterable[Metric]:
        """Sequences that gave way, and came back."""
        stats = self._engine.stats
        yield self._counter("num_preemptions", "Sequences swapped out to the host.", stats.swaps_out)
        labels = ["model_name", "direction"]
        swaps = CounterMetricFamily(self._name("swaps"), "Sequences swapped.", labels=labels)
        swaps.add_metric([self._series.model_name, "out"], stats.swaps_out)
        swaps.add_metric([self._series.model_name, "in"], stats.swaps_in)
        yield swaps

    def _cache_config(self) -> Metric:
        """A gauge of 1 whose labels say how the cache is laid out; routers read it under vLLM's names."""
        card = self._engine.card
        labels = {
            "model_name": self._series.model_name,
            "block_size": str(PAGE_SIZE),
            "num_gpu_blocks": str(card.num_pages),
            "page_bytes": str(card.page_bytes),
            "cache_dtype": card.dtype if card.cache_dtype == "auto" else card.cache_dtype,
        }
        name = self._name("cache_config_info")
        family = GaugeMetricFamily(name, "How the cache is laid out.", labels=list(labels))
        family.add_metric(list(labels.values()), 1)
        return family

    def _gauge(self, name: str, words: str, value: float) -> Metric:
        family = GaugeMetricFamily(self._name(name), words, labels=["model_name"])
        family.add_metric([self._series.model_name], value)
        return family

    def _counter(self, name: str, words: str, value: float) -> Metric:
        family = CounterMetricFamily(self._name(name), words, labels=["model_name"])
        family.add_metric([self._series.model_name], value)
        return family

    def _name(self, name: str) -> str:
        return self._series.full_name(name)

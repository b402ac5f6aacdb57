"""Series: counters and histograms of one model, under vLLM's names with the prefix that was asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram

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


@dataclass(frozen=True, slots=True)
class Series:
    """Owns the registry. All that is made here carries the model's name."""

    model_name: str
    prefix: str = OURS
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def full_name(self, name: str) -> str:
        """The name on the wire, without the suffixes that Prometheus adds."""
        return f"{self.prefix if name in OF_VLLM else OURS}:{name}"

    def counter(self, name: str, words: str, label: str) -> Callable[[str], Counter]:
        """One for each value of a label."""
        family = Counter(self.full_name(name), words, ["model_name", label], registry=self.registry)
        return partial(family.labels, self.model_name)

    def histogram(self, name: str, words: str, buckets: Sequence[float]) -> Histogram:
        family = Histogram(
            self.full_name(name), words, ["model_name"], buckets=buckets, registry=self.registry
        )
        return family.labels(self.model_name)

    def histograms(
        self, name: str, words: str, label: str, buckets: Sequence[float]
    ) -> Callable[[str], Histogram]:
        """One for each value of a label."""
        labels = ["model_name", label]
        family = Histogram(self.full_name(name), words, labels, buckets=buckets, registry=self.registry)
        return partial(family.labels, self.model_name)

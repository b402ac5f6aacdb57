"""RequestMeter: the times and counts of one request, from its arrival to its end."""

import time
from typing import TYPE_CHECKING

from engine.messages import Cost, FinishReason
from server.prepare import Job
from server.record import RequestRecord

if TYPE_CHECKING:
    from server.metrics import Metrics


class RequestMeter:
    """Feeds the histograms as things happen, and makes the record at the end."""

    def __init__(self, metrics: "Metrics", job: Job) -> None:
        self._metrics = metrics
        self._job = job
        self._cost: Cost | None = None
        self._num_tokens = 0
        self._first: float | None = None  # when the first tokens came
        self._last: float | None = None  # when the newest did
        metrics.choices.observe(job.submit.choices)
        metrics.answer_limit.observe(job.submit.sampling.max_tokens)

    def tokens(self, count: int, cost: Cost | None) -> None:
        """New tokens came; `cost` comes with the first."""
        now = time.monotonic()
        if cost is not None:
            self._cost = cost
            self._observe_prompt(cost)
        if count == 0:
            return
        if self._last is None:
            self._first = now
            self._metrics.ttft.observe(now - self._job.arrived)
            count -= 1
            self._num_tokens += 1
        for _ in range(count):
            self._metrics.between.observe((now - (self._last or now)) / count)
        self._num_tokens += count
        self._last = now

    def close(self, reason: FinishReason, error: str | None = None) -> None:
        """The request ended; `error` is the code of what ended it."""
        metrics, seconds = self._metrics, time.monotonic() - self._job.arrived
        metrics.success.labels(metrics.model_name, reason.value).inc()
        metrics.latency.observe(seconds)
        metrics.answer_length.observe(self._num_tokens)
        if self._first is not None and self._last is not None:
            decoding = self._last - self._first
            metrics.decoded.observe(decoding)
            if self._num_tokens > 1:
                metrics.per_token.observe(decoding / (self._num_tokens - 1))
            if self._cost is not None:
                metrics.inferred.observe(self._cost.prefill_seconds + decoding)
        metrics.ended(
            RequestRecord(
                job=self._job,
                finish_reason=reason,
                error=error,
                cost=self._cost,
                num_tokens=self._num_tokens,
                arrived=time.time() - seconds,
                first_token_seconds=None if self._first is None else self._first - self._job.arrived,
                seconds=seconds,
            )
        )

    def _observe_prompt(self, cost: Cost) -> None:
        metrics = self._metrics
        metrics.prompt_length.observe(cost.kv_tokens_total)
        metrics.computed.observe(cost.kv_tokens_total - cost.cached_tokens)
        metrics.queued.observe(cost.queue_seconds)
        metrics.prefilled.observe(cost.prefill_seconds)
        metrics.read_fraction.observe(cost.prefill_read_fraction)
        metrics.kept_fraction.observe(cost.kv_tokens_kept / cost.kv_tokens_total)
        if cost.attention_recall is not None:
            metrics.recall.observe(cost.attention_recall)
        if cost.attention_recall_p5 is not None:
            metrics.recall_p5.observe(cost.attention_recall_p5)
        plan = self._job.plan
        is_sparse = any(run.prefill != "dense" for run in plan.layers)
        if is_sparse and cost.kv_tokens_total < (plan.dense_below or 0):
            metrics.fallbacks.labels(metrics.model_name, "short_prompt").inc()
        elif cost.floored_chunks:
            metrics.fallbacks.labels(metrics.model_name, "recall_floor").inc()

"""RequestMeter: the times and counts of one request, from its arrival to its end."""

import time
from collections.abc import Callable

from engine.messages import Cost, FinishReason
from server.prepare import Job
from server.record import RequestRecord
from server.request_series import RequestSeries


class RequestMeter:
    """Feeds the histograms as things happen, and makes the record at the end."""

    def __init__(self, series: RequestSeries, job: Job, on_end: Callable[[RequestRecord], None]) -> None:
        self._series = series
        self._job = job
        self._on_end = on_end
        self._cost: Cost | None = None
        self._num_tokens = 0
        self._first: float | None = None  # when the first tokens came
        self._last: dict[int, float] = {}  # when the newest of each choice did
        self._between = 0.0  # seconds between tokens, all choices together
        series.sizes.choices.observe(job.submit.choices)
        series.sizes.answer_limit.observe(job.submit.sampling.max_tokens)

    def tokens(self, count: int, cost: Cost | None, choice: int = 0) -> None:
        """New tokens of a choice came; `cost` comes with the first of all."""
        now, times = time.monotonic(), self._series.times
        if cost is not None:
            self._cost = cost
            self._observe_prompt(cost)
        if count == 0:
            return
        if self._first is None:
            self._first = now
            times.ttft.observe(now - self._job.arrived)
        self._num_tokens += count
        gaps = count if choice in self._last else count - 1  # nothing comes before a choice's first token
        seconds = now - self._last.get(choice, now)
        for _ in range(gaps):
            times.between.observe(seconds / gaps)
        self._between += seconds
        self._last[choice] = now

    def close(self, reason: FinishReason, error: str | None = None) -> None:
        """The request ended; `error` is the code of what ended it."""
        times, seconds = self._series.times, time.monotonic() - self._job.arrived
        self._series.ended(reason.value).inc()
        self._series.sizes.answer.observe(self._num_tokens)
        times.latency.observe(seconds)
        if self._first is not None:
            decoding = max(self._last.values()) - self._first
            times.decoded.observe(decoding)
            if self._num_tokens > len(self._last):
                times.per_token.observe(self._between / (self._num_tokens - len(self._last)))
            if self._cost is not None:
                times.inferred.observe(self._cost.prefill_seconds + decoding)
        self._on_end(
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
        times, sizes, quality = self._series.times, self._series.sizes, self._series.quality
        sizes.prompt.observe(cost.kv_tokens_total)
        sizes.computed.observe(cost.kv_tokens_total - cost.cached_tokens)
        times.queued.observe(cost.queue_seconds)
        times.prefilled.observe(cost.prefill_seconds)
        quality.read_fraction.observe(cost.prefill_read_fraction)
        quality.kept_fraction.observe(cost.kv_tokens_kept / cost.kv_tokens_total)
        if cost.attention_recall is not None:
            quality.recall.observe(cost.attention_recall)
        if cost.attention_recall_p5 is not None:
            quality.recall_p5.observe(cost.attention_recall_p5)
        plan = self._job.plan
        is_sparse = any(run.prefill != "dense" for run in plan.layers)
        if is_sparse and cost.kv_tokens_total < (plan.dense_below or 0):
            self._series.fallbacks("short_prompt").inc()
        elif cost.floored_chunks:
            self._series.fallbacks("recall_floor").inc()

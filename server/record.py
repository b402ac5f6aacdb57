"""RequestRecord: one request as it ended, for logs and traces. Nothing of what was asked or answered."""

import logging
from dataclasses import dataclass
from typing import Any

from configs.logs import REQUESTS
from engine.messages import Cost, FinishReason
from server.prepare import Job

log = logging.getLogger(REQUESTS)


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """Times are of the wall clock or, where they say seconds, since arrival."""

    job: Job
    finish_reason: FinishReason
    error: str | None  # code of what ended it, where something did
    cost: Cost | None  # None: its prompt was never computed
    num_tokens: int  # of all answers
    arrived: float  # Unix seconds
    first_token_seconds: float | None
    seconds: float

    @property
    def operation(self) -> str:
        """In the words of OpenTelemetry."""
        return "text_completion" if self.job.submit.request_id.startswith("cmpl-") else "chat"

    def json(self) -> dict[str, Any]:
        """Flat, with plain values."""
        submit, cost = self.job.submit, self.cost
        return {
            "id": submit.request_id,
            "x_request_id": self.job.client_id,
            "operation": self.operation,
            "plan": self.job.plan.name,
            "plan_digest": self.job.plan.digest,
            "finish_reason": self.finish_reason.value,
            "error": self.error,
            "prompt_tokens": submit.prompt_length,
            "answer_tokens": self.num_tokens,
            "choices": submit.choices,
            "seconds": round(self.seconds, 6),
            "first_token_seconds": self.first_token_seconds and round(self.first_token_seconds, 6),
            "queue_seconds": cost and round(cost.queue_seconds, 6),
            "prefill_seconds": cost and round(cost.prefill_seconds, 6),
            "cached_tokens": cost and cost.cached_tokens,
            "read_fraction": cost and round(cost.prefill_read_fraction, 4),
            "attention_recall": cost and cost.attention_recall,
            "kv_tokens_kept": cost and cost.kv_tokens_kept,
            "kv_bytes": cost and cost.kv_bytes,
        }


def log_request(record: RequestRecord) -> None:
    """One line for one ended request."""
    content = record.json()
    words = " ".join(f"{name}={value}" for name, value in content.items() if value is not None)
    log.info(words, extra={"request": content})

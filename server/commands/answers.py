"""One streamed answer of a running server, with the times at which it came."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from server.commands.remote import Remote

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@dataclass(slots=True)
class Answer:
    """What came, complete or not. Times in seconds since the request was sent."""

    text: str = ""
    finish_reason: str | None = None  # None: it was stopped before its end
    usage: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)  # the `farspan` object; empty from other servers
    arrivals: list[float] = field(default_factory=list)  # of each event with something new
    seconds: float = 0.0

    @property
    def num_tokens(self) -> int:
        return int(self.usage.get("completion_tokens") or len(self.arrivals))

    @property
    def tokens_per_second(self) -> float | None:
        """Behind the first token; None where there is no second."""
        if len(self.arrivals) < 2 or self.num_tokens < 2:
            return None
        return (self.num_tokens - 1) / (self.arrivals[-1] - self.arrivals[0])


def ask(
    remote: Remote,
    path: str,
    body: dict[str, Any],
    on_text: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[dict[str, Any]], None] = lambda progress: None,
) -> Answer:
    """Stream one answer; Ctrl-C ends it, and what has come is the answer. Raises Trouble.

    `on_progress` hears how much of the prompt is computed, where the body asks for that.
    """
    answer = Answer()
    began = time.perf_counter()
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        with remote.stream(path, streamed) as events:
            for event in events:
                if not event.get("choices") and "progress" in (event.get("farspan") or {}):
                    on_progress(event["farspan"]["progress"])
                _take(answer, event, time.perf_counter() - began, on_text)
    except KeyboardInterrupt:
        remote.hang_up()
        answer.finish_reason = None
    answer.seconds = time.perf_counter() - began
    return answer


def _take(answer: Answer, event: dict[str, Any], seconds: float, on_text: Callable[[str], None]) -> None:
    answer.usage = event.get("usage") or answer.usage
    for choice in event.get("choices", ()):
        answer.cost = event.get("farspan") or answer.cost
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        delta = choice.get("delta", choice)
        new = (delta.get("reasoning_content") or "") + (delta.get("content") or delta.get("text") or "")
        if new:
            answer.arrivals.append(seconds)
            answer.text += new
            on_text(new)


def summary(answer: Answer) -> str:
    """What an answer cost, in one line."""
    cost, usage = answer.cost, answer.usage
    parts = [str(cost["plan"])] if cost else []
    if usage:
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        parts.append(
            f"prompt {usage['prompt_tokens']:,} tokens" + (f" ({cached:,} cached)" if cached else "")
        )
    if cost:
        kept = cost["kv_tokens_kept"] / max(1, cost["kv_tokens_total"])
        parts.append(f"read {cost['prefill_read_fraction']:.0%}")
        parts.append(f"kept {cost['kv_tokens_kept']:,.0f} ({kept:.0%})")
    if answer.arrivals:
        parts.append(f"first token {answer.arrivals[0]:.2f} s")
    if answer.tokens_per_second is not None:
        parts.append(f"{answer.tokens_per_second:.1f} tokens/s")
    if answer.finish_reason is None:
        parts.append("stopped")
    elif answer.finish_reason == "length":
        parts.append("cut at its longest")
    return " · ".join(parts)

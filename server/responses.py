"""The JSON of replies and of the chunks of a stream, for chat and text completions."""

from dataclasses import dataclass
from typing import Any, Literal

from engine.messages import Cost


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, taken from the prefix cache

    def json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class Reply:
    """What all JSON of one request shares."""

    kind: Literal["chat", "text"]
    request_id: str
    created: int  # Unix seconds
    model: str
    fingerprint: str

    def whole(self, text: str, finish_reason: str, usage: Usage, cost: Cost | None) -> dict[str, Any]:
        """The reply to a request that does not stream."""
        if self.kind == "chat":
            choice: dict[str, Any] = {"message": {"role": "assistant", "content": text, "refusal": None}}
        else:
            choice = {"text": text}
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return self._object(name, choice, finish_reason) | {"usage": usage.json(), "farspan": cost_json(cost)}

    def first_chunk(self) -> dict[str, Any] | None:
        """What opens a stream: the role, in a chat."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}) if self.kind == "chat" else None

    def text_chunk(self, text: str) -> dict[str, Any]:
        return self._chunk({"delta": {"content": text}} if self.kind == "chat" else {"text": text})

    def last_chunk(self, finish_reason: str, cost: Cost | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"delta": {}} if self.kind == "chat" else {"text": ""}
        return self._chunk(choice, finish_reason) | {"farspan": cost_json(cost)}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The extra chunk that `stream_options.include_usage` asks for."""
        return self._chunk({}) | {"choices": [], "usage": usage.json()}

    def _chunk(self, choice: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return self._object(name, choice, finish_reason)

    def _object(self, name: str, choice: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {
            "id": self.request_id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": [{"index": 0, **choice, "logprobs": None, "finish_reason": finish_reason}],
        }


def cost_json(cost: Cost | None) -> dict[str, Any] | None:
    """The `farspan` object: what the prompt cost under its plan."""
    if cost is None:
        return None
    return {
        "plan": cost.plan,
        "prefill_read_fraction": cost.prefill_read_fraction,
        "attention_recall": cost.attention_recall,
        "attention_recall_p5": cost.attention_recall_p5,
        "attention_recall_samples": cost.attention_recall_samples,
        "kv_tokens_total": cost.kv_tokens_total,
        "kv_tokens_kept": cost.kv_tokens_kept,
        "kv_bytes": cost.kv_bytes,
    }

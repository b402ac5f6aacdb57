"""What the JSON of all replies shares: the head, the usage, and what the prompt cost under its plan."""

from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from engine.messages import Cost
from server.completion import Piece
from server.prepare import Job
from server.request import Request


class Reply(Protocol):
    """The JSON of one request, from the pieces of its answer. Used once."""

    async def whole(self, pieces: AsyncGenerator[Piece, None]) -> dict[str, Any]:
        """The reply to a request that does not stream."""

    def chunks(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a streamed reply."""


@dataclass(frozen=True, slots=True)
class Head:
    """What all JSON of one request begins with."""

    request_id: str
    created: int  # Unix seconds
    model: str
    fingerprint: str

    def json(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.request_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def progress_json(job: Job, computed: int) -> dict[str, Any]:
    """What a chunk without choices says while the prompt is computed."""
    progress = {"prompt_tokens_computed": computed, "prompt_tokens": job.submit.prompt_length}
    return {"choices": [], "farspan": {"progress": progress}}


def usage_json(job: Job, *last: Piece) -> dict[str, Any]:
    """Tokens of a request whose choices ended with these pieces."""
    prompt = job.submit.prompt_length
    cost = cost_of(*last)
    cached = cost.cached_tokens if cost is not None else 0  # taken from the prefix cache
    answer = sum(piece.num_tokens for piece in last)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def chunk_usage(request: Request, job: Job, latest: Iterable[Piece]) -> dict[str, Any]:
    """What a chunk says of the usage: nothing, null until the last one, or what there is so far."""
    if not request.include_usage:
        return {}
    return {"usage": usage_json(job, *latest) if request.continuous_usage else None}


def cost_of(*pieces: Piece) -> Cost | None:
    """What the prompt cost: the first choice's pieces know."""
    return next((piece.cost for piece in pieces if piece.cost is not None), None)


def cost_json(cost: Cost | None) -> dict[str, Any] | None:
    """The `farspan` object: what the prompt cost under its plan."""
    if cost is None:
        return None
    content = {
        "plan": cost.plan,
        "prefill_read_fraction": cost.prefill_read_fraction,
        "decode_read_fraction": cost.decode_read_fraction,
        "attention_recall": cost.attention_recall,
        "attention_recall_p5": cost.attention_recall_p5,
        "attention_recall_samples": cost.attention_recall_samples,
        "kv_tokens_total": cost.kv_tokens_total,
        "kv_tokens_kept": cost.kv_tokens_kept,
        "kv_bytes": cost.kv_bytes,
    }
    if cost.heads is not None:
        content["per_head"] = {
            "prefill_read_fraction": cost.heads.read_fraction,
            "kv_tokens_kept": cost.heads.kept,
        }
    return content

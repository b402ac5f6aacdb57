"""Sequence: one request inside the engine. Its progress is a counter, not a phase: `computed` catches up
with its tokens."""

import time
from dataclasses import dataclass, field

import numpy as np

from configs.model import PAGE_SIZE
from engine.messages import Cost, FinishReason, Sampling, Submit
from engine.plans import ResolvedPlan


@dataclass(slots=True)
class PrefillCost:
    """What the prompt's forwards read, summed over chunks, layers and heads."""

    read_cells: float = 0.0  # keys read x query rows, at the kernel's tiles
    causal_cells: int = 0  # the same if everything had been read
    recalls: list[np.ndarray] = field(default_factory=list)  # sampled attention recall, flat

    @property
    def read_fraction(self) -> float:
        return self.read_cells / self.causal_cells if self.causal_cells else 1.0


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one request, owned by the scheduler. Pages and lengths of its rows belong to the cache,
    under `slot`."""

    request_id: str
    tokens: list[int]
    prompt_length: int
    sampling: Sampling
    plan: ResolvedPlan
    arrived: float  # time.monotonic()
    computed: int = 0  # tokens whose keys and values are in the cache
    slot: int | None = None
    admitted: float | None = None
    cost: PrefillCost = field(default_factory=PrefillCost)
    prompt_cost: Cost | None = None  # once the prompt is computed
    finish_reason: FinishReason | None = None

    @classmethod
    def from_submit(cls, submit: Submit, plan: ResolvedPlan) -> "Sequence":
        return cls(
            request_id=submit.request_id,
            tokens=list(submit.tokens),
            prompt_length=submit.prompt_length,
            sampling=submit.sampling,
            plan=plan,
            arrived=time.monotonic(),
        )

    @property
    def total_length(self) -> int:
        """Prompt plus the most that may be generated: frozen at admission."""
        return self.prompt_length + self.sampling.max_tokens

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def in_prefill(self) -> bool:
        return self.computed < self.prompt_length

    @property
    def pages_needed(self) -> int:
        return self.plan.pages_needed(self.prompt_length, self.total_length)

    def chunk_end(self, room: int) -> int:
        """Where the next chunk of the prompt ends, given room for so many tokens.

        Grid plans end on their grid whatever the room, so that an answer never depends on load; others may
        end at any page. A boundary with fewer than `plan.window` tokens behind it is skipped: the last
        chunk absorbs them.
        """
        end = (self.computed // self.plan.chunk + 1) * self.plan.chunk
        if not self.plan.grid or self.plan.is_dense(self.prompt_length):
            end = min(end, max(self.computed + room, self.computed + PAGE_SIZE) // PAGE_SIZE * PAGE_SIZE)
        return end if self.prompt_length - end >= self.plan.window else self.prompt_length

    def should_stop(self, end_tokens: tuple[int, ...]) -> FinishReason | None:
        """Does the newest token end this sequence?"""
        last = self.tokens[-1]
        if last in self.sampling.stop_token_ids or (last in end_tokens and not self.sampling.ignore_eos):
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_generated >= self.sampling.max_tokens else None

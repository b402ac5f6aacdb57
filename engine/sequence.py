"""Sequence: one request inside the engine. Its progress is a counter, not a phase: `computed` catches up
with its tokens."""

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from configs.model import PAGE_SIZE
from engine.constraint import Constraint
from engine.messages import Cost, FinishReason, Logprobs, Reports, Sampling, Submit
from engine.plans import ResolvedPlan
from engine.sampler import TokenCounts
from engine.sharing import Shareable, shareable
from kvcache.host import Swapped
from kvcache.pool import pages_for


@dataclass(slots=True)
class PrefillCost:
    """What the prompt's forwards read, summed over chunks."""

    read_cells: NDArray[np.float64] | None = None  # [L, Hq] keys read x query rows, at the kernel's tiles
    causal_cells: NDArray[np.float64] | None = None  # [L, 1] the same of any head if all had been read
    recalls: list[np.ndarray] = field(default_factory=list)  # sampled attention recall, flat
    knows_recall: bool = True  # not once keys had left that full attention would have read
    floored_chunks: int = 0  # in which a recall floor made heads read everything

    def add(self, read: Tensor, causal: list[int]) -> None:
        """The cells of a chunk: read [L, Hq], and what one head of each layer would have read."""
        cells, most = read.cpu().double().numpy(), np.array(causal, dtype=np.float64)[:, None]
        self.read_cells = cells if self.read_cells is None else self.read_cells + cells
        self.causal_cells = most if self.causal_cells is None else self.causal_cells + most

    @property
    def read_fraction(self) -> float:
        """Over all layers and heads; 1 where nothing had to be read."""
        if self.read_cells is None or self.causal_cells is None:
            return 1.0
        return float(self.read_cells.sum() / (self.causal_cells.sum() * self.read_cells.shape[1]))

    def read_fractions(self, num_kv_heads: int) -> NDArray[np.float64]:
        """By layer and KV head, the mean of its query heads: [L, Hkv]; [0, Hkv] where nothing was read."""
        if self.read_cells is None or self.causal_cells is None:
            return np.empty((0, num_kv_heads))
        fractions = self.read_cells / self.causal_cells
        by_group: NDArray[np.float64] = fractions.reshape(len(fractions), num_kv_heads, -1).mean(-1)
        return by_group


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
    swapped: Swapped | None = None  # what it held, while it is out
    admitted: float | None = None
    cost: PrefillCost = field(default_factory=PrefillCost)
    decode_read: int = 0  # tokens that generated ones read, over layers and KV heads, if the plan chooses
    decode_held: int = 0  # the same if they had read all
    prompt_cost: Cost | None = None  # once the prompt is computed
    prompt_logprobs: list[Logprobs] = field(default_factory=list)  # of the prompt so far, where asked for
    counts: TokenCounts | None = None  # the runner's, for penalties
    constraint: Constraint | None = None  # the engine's, where the answer has a grammar
    priority: int = 0  # lower ones are admitted first
    reports: Reports = Reports()  # what its client wants to know beside the answer
    choice: int = 0  # which of the answers to its request
    siblings: list["Sequence"] = field(
        default_factory=list
    )  # choices that fork off when the prompt is computed
    shareable: Shareable | None = None  # None: it neither borrows nor publishes
    cached: int = 0  # tokens of the prompt taken from the prefix cache
    published: int = 0  # blocks that went there, or came from there
    may_publish: int = 0  # blocks at most
    finish_reason: FinishReason | None = None

    @classmethod
    def from_submit(cls, submit: Submit, plan: ResolvedPlan) -> "Sequence":
        choices = [
            cls(
                request_id=submit.request_id,
                tokens=list(submit.tokens),
                prompt_length=submit.prompt_length,
                sampling=submit.sampling,
                plan=plan,
                arrived=time.monotonic(),
                priority=submit.priority,
                reports=submit.reports,
                choice=submit.first_choice + number,
            )
            for number in range(submit.choices)
        ]
        first = choices[0]
        first.siblings = choices[1:]
        if submit.share and submit.sampling.prompt_logprobs is None:  # whose rows must all be computed
            first.shareable = shareable(
                plan, first.tokens, first.prompt_length, first.total_length, submit.cache_salt
            )
            first.may_publish = first.shareable.publishable
        return first

    @property
    def choices(self) -> list["Sequence"]:
        """Itself, and those that wait to be forked off it."""
        return [self, *self.siblings]

    @property
    def pins(self) -> bool:
        """May it count on borrowed pages? Not if its policy drops pages as it goes."""
        return self.plan.policy.reach(self.total_length) is None

    @property
    def total_length(self) -> int:
        """Prompt plus the most that may be generated: frozen at admission."""
        return self.prompt_length + self.sampling.max_tokens

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def decode_read_fraction(self) -> float | None:
        """Of what was held, the share that generated tokens read; None where nothing chooses."""
        return self.decode_read / self.decode_held if self.decode_held else None

    @property
    def in_prefill(self) -> bool:
        return self.computed < self.prompt_length

    def pages_needed(self, *, sharing: bool) -> int:
        """The most pages it will hold at once. What others read is not compacted in place, but copied, and
        the copy with what is generated must be its own: pages it gave back may still be counted on."""
        pages = self.plan.pages_needed(self.prompt_length, self.total_length)
        if sharing and self.plan.policy.compacts:
            pages += self.plan.policy.pages_after_prefill(self.prompt_length, self.total_length)
        return pages

    def pages_at_first(self, num_rows: int, *, sharing: bool) -> int:
        """What of that its prompt takes, with a page per row to begin the answer (rows: L * Hkv)."""
        pages = min(self.pages_needed(sharing=False), num_rows * (1 + pages_for(self.prompt_length)))
        if sharing and self.plan.policy.compacts:
            begun = min(self.total_length, self.prompt_length + PAGE_SIZE)
            pages += self.plan.policy.pages_after_prefill(self.prompt_length, begun)
        return pages

    def pages_of_fork(self, num_rows: int) -> int:
        """The most pages that a choice will hold beside the full ones it shares (rows: L * Hkv)."""
        if not self.pins:
            return self.plan.policy.pages_after_prefill(self.prompt_length, self.total_length)
        return num_rows * (1 + pages_for(self.sampling.max_tokens))  # a copied page, and what is generated

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

    def should_stop(self) -> FinishReason | None:
        """Does the newest token end this sequence?"""
        if self.tokens[-1] in self.sampling.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_generated >= self.sampling.max_tokens else None


def slot_of(sequence: Sequence) -> int:
    """The slot of a sequence that runs."""
    assert sequence.slot is not None, f"{sequence.request_id} runs in no slot"
    return sequence.slot

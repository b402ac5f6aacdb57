"""Scheduler: which sequences run in the next step. Owns the queue of waiting sequences, the list of
running ones and, with a host tier, of those that gave way to them."""

import time
from bisect import insort
from collections import deque
from dataclasses import dataclass

from configs.model import PAGE_SIZE
from configs.schema import SchedulerConfig
from engine.sequence import Sequence, slot_of
from engine.sharing import Shareable
from kvcache.cache import KVCache
from kvcache.prefix import NO_COLUMNS, Columns

FIRST_CHUNK = 256  # prompt tokens beside decodes before any step was timed
SLACK = 2.0  # steps vary: only one that took so many times its target was cut too large


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """The tokens [start, end) of one sequence's prompt, in the next forward."""

    sequence: Sequence
    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work: every decode first, then prompt chunks."""

    decodes: list[Sequence]
    chunks: list[ChunkPlan]

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(chunk.length for chunk in self.chunks)

    @property
    def sequences(self) -> list[Sequence]:
        return self.decodes + [chunk.sequence for chunk in self.chunks]


class Scheduler:
    """First come, first served; whole prompts are admitted or wait; prompts leave time to those who generate.

    While others generate, a step takes as much of the prompts as fits `step_seconds`, going by what a prompt
    token added to the last such step. Chunks of a grid plan cannot be cut: when one ran longer, steps without
    prompts follow until the prompts are back to their share of the time.

    With a host tier a sequence is admitted before the pages of its answer are sure. Where pages run out, the
    youngest that may leave swaps out, and comes back before anybody new is let in: see `Promises`.
    """

    def __init__(self, config: SchedulerConfig, cache: KVCache) -> None:
        self._config = config
        self._cache = cache
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.swapped: list[Sequence] = []  # oldest first
        self.swaps_out = 0
        self.swaps_in = 0
        self._owed_seconds = 0.0  # decode time that prompts still owe for the chunks they ran
        self._decode_seconds = 0.0  # of the last step without prompts
        self._token_seconds = config.step_seconds / FIRST_CHUNK  # what a prompt token adds to a step

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.swapped)

    def add(self, sequence: Sequence) -> None:
        """It waits behind those that are as urgent, in front of those that are less."""
        insort(self.waiting, sequence, key=_priority)

    def find(self, request_id: str) -> list[Sequence]:
        """Its choices; those that were not forked yet belong to the first."""
        return [s for s in [*self.running, *self.swapped, *self.waiting] if s.request_id == request_id]

    def fork(self, sequence: Sequence) -> None:
        """Its prompt is computed: the other choices run from here on, beside it."""
        slots = [sibling.slot for sibling in sequence.siblings]
        assert sequence.slot is not None and None not in slots
        self._cache.fork(sequence.slot, [slot for slot in slots if slot is not None], pin=sequence.pins)
        for sibling in sequence.siblings:
            sibling.computed = sequence.computed
            sibling.shareable = None  # what it generates is its own
            insort(self.running, sibling, key=_age)
        sequence.siblings = []
        sequence.shareable = None

    def next_batch(self) -> Batch:
        """All decodes, then chunks of prompts in the order of arrival while there is room."""
        if self._cache.host is not None:
            self._share_out_pages()
        if not self.swapped:
            self._admit()
        decodes = [sequence for sequence in self.running if not sequence.in_prefill]
        prompts = [sequence for sequence in self.running if sequence.in_prefill]
        if decodes and self._owed_seconds > 0:
            return Batch(decodes, [])
        chunks: list[ChunkPlan] = []
        room = self._config.max_num_batched_tokens - len(decodes)
        if decodes:
            left = max(0.0, self._config.step_seconds - self._decode_seconds)
            room = min(room, int(left / self._token_seconds))
        coming: set[bytes] = set()  # blocks that a prompt before it in the queue is about to compute
        for sequence in prompts:
            if sequence.shareable is not None:
                if sequence.computed == sequence.cached:
                    self._borrow_more(sequence)
                    if sequence.shareable.next_unit(sequence.cached // PAGE_SIZE) in coming:
                        continue
                coming.update(sequence.shareable.keys[sequence.published : sequence.may_publish])
            end = sequence.chunk_end(room)
            if chunks and end - sequence.computed > room:
                break  # the first chunk always runs, so that every prompt moves on
            chunks.append(ChunkPlan(sequence, sequence.computed, end))
            room -= end - sequence.computed
        return Batch(decodes, chunks)

    def account(self, batch: Batch, seconds: float) -> None:
        """Learn from how long a step took, and note what prompts that ran beside decodes took from them."""
        if batch.chunks:
            decodes = self._decode_seconds if batch.decodes else 0.0
            prompt_tokens = batch.num_tokens - len(batch.decodes)
            # Steps vary: a quick one must not make prompt tokens look free.
            self._token_seconds = max(seconds - decodes, seconds / 2) / prompt_tokens
        else:
            self._decode_seconds = seconds
        if not batch.decodes:
            self._owed_seconds = 0.0
        elif not batch.chunks:
            self._owed_seconds = max(0.0, self._owed_seconds - seconds)
        elif seconds > SLACK * self._config.step_seconds:
            share = self._config.prefill_share
            self._owed_seconds = seconds * (1 - share) / share

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, with the choices not yet forked off it; pages go back."""
        if sequence.swapped is not None:
            self.swapped.remove(sequence)
            self._cache.forget(sequence.swapped)
            sequence.swapped = None
            return
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        for choice in sequence.choices:
            assert choice.slot is not None
            self._cache.release(choice.slot)
            choice.slot = None

    def _admit(self) -> None:
        while self.waiting and self._take_in(self.waiting[0]):
            self.running.append(self.waiting.popleft())

    def _share_out_pages(self) -> None:
        """Decodes get pages for their next tokens, the oldest first; then those that are out come back."""
        for sequence in self.running:
            self._cache.secure(slot_of(sequence))
        for sequence in [one for one in self.running if not one.in_prefill]:
            while sequence.slot is not None and not self._cache.grow(sequence.slot):
                self._swap_out_youngest()
        while self.swapped and self._swap_in(self.swapped[0]):
            self.swapped.pop(0)

    def _swap_out_youngest(self) -> None:
        covered = [one for one in self.running if self._cache.can_swap_out(slot_of(one))]
        assert covered, "sequences that are secured could all grow to their most"
        sequence = covered[-1]
        sequence.swapped = self._cache.swap_out(slot_of(sequence))
        sequence.slot = None
        self.running.remove(sequence)
        insort(self.swapped, sequence, key=_age)
        self.swaps_out += 1

    def _swap_in(self, sequence: Sequence) -> bool:
        assert sequence.swapped is not None
        if not self._cache.can_swap_in(sequence.swapped):
            return False
        sequence.slot = self._cache.swap_in(sequence.swapped)
        sequence.swapped = None
        insort(self.running, sequence, key=_age)
        self._cache.secure(sequence.slot)
        self.swaps_in += 1
        return True

    def _take_in(self, sequence: Sequence) -> bool:
        """Promise pages and slots to the first in the queue, or let it wait.

        Later ones must not overtake: a long prompt would wait for ever. Sharing may cost a copy. A sequence
        that has nothing to borrow, or that nobody is there to wait for, does without if that lets it in.
        """
        live = sum(len(one.choices) for one in self.running)  # nobody is out
        if live + len(sequence.choices) > self._config.max_num_seqs:
            return False
        fork_pages = len(sequence.siblings) * sequence.pages_of_fork(self._cache.num_rows)
        if sequence.shareable is not None:
            known = self._take_in_sharing(sequence, sequence.shareable, fork_pages)
            if sequence.slot is None:
                if self.running and known:
                    return False
                sequence.shareable = None
        if sequence.slot is None:
            pages, most = self._pages(sequence, sharing=False)
            if not self._cache.can_admit(
                pages + fork_pages, most=most + fork_pages, slots=len(sequence.choices)
            ):
                return False
            sequence.slot = self._cache.admit(pages, most=most)
        for sibling in sequence.siblings:
            sibling.slot = self._cache.admit(sequence.pages_of_fork(self._cache.num_rows))
        for choice in sequence.choices:
            choice.admitted = time.monotonic()
        return True

    def _take_in_sharing(self, sequence: Sequence, shareable: Shareable, fork_pages: int) -> int:
        """Give it a slot behind what is known of its beginning, if that can be. Returns blocks known."""
        cache = self._cache
        known = shareable.hit(cache.known(shareable.keys[: shareable.usable], shareable.tokens))
        keys = shareable.keys[:known]
        pages, most = self._pages(sequence, sharing=True)
        pinned = cache.prefix.find(keys, shareable.tokens) if sequence.pins else NO_COLUMNS
        if cache.can_admit(
            pages + fork_pages, most=most + fork_pages, slots=len(sequence.choices), columns=pinned
        ):
            chain = cache.restore(keys, shareable.tokens)
            chain = chain[: shareable.hit(chain.size)]
            sequence.slot = cache.admit(pages, most=most, columns=chain if sequence.pins else NO_COLUMNS)
            self._borrow(sequence, chain)
        return known

    def _pages(self, sequence: Sequence, *, sharing: bool) -> tuple[int, int]:
        """Pages to promise at once, and at most. Choices of one prompt share too much to be swapped out."""
        most = sequence.pages_needed(sharing=sharing)
        if self._cache.host is None or sequence.siblings:
            return most, most
        return min(most, sequence.pages_at_first(self._cache.num_rows, sharing=sharing)), most

    def _borrow_more(self, sequence: Sequence) -> None:
        """Others may have published since a waiting prompt was admitted."""
        shareable = sequence.shareable
        assert shareable is not None
        chain = self._cache.prefix.find(shareable.keys[: shareable.usable], shareable.tokens)
        chain = chain[: shareable.hit(chain.size)]
        if chain.size * PAGE_SIZE > sequence.cached:
            self._borrow(sequence, chain)

    def _borrow(self, sequence: Sequence, chain: Columns) -> None:
        """Start behind these columns."""
        assert sequence.slot is not None
        reach = sequence.plan.policy.reach(sequence.total_length)
        left = None if reach is None else reach.left(chain.size)
        self._cache.borrow(sequence.slot, chain, left=left)
        sequence.cached = sequence.computed = chain.size * PAGE_SIZE
        sequence.published = max(sequence.published, chain.size)


def _priority(sequence: Sequence) -> int:
    return sequence.priority


def _age(sequence: Sequence) -> float:
    """When it was let in."""
    assert sequence.admitted is not None
    return sequence.admitted

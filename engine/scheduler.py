"""Scheduler: which sequences run in the next step. Owns the queue of waiting sequences and the list of
running ones."""

import time
from collections import deque
from dataclasses import dataclass

from configs.schema import SchedulerConfig
from engine.sequence import Sequence
from kvcache.cache import KVCache

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
    """

    def __init__(self, config: SchedulerConfig, cache: KVCache) -> None:
        self._config = config
        self._cache = cache
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._owed_seconds = 0.0  # decode time that prompts still owe for the chunks they ran
        self._decode_seconds = 0.0  # of the last step without prompts
        self._token_seconds = config.step_seconds / FIRST_CHUNK  # what a prompt token adds to a step

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def find(self, request_id: str) -> Sequence | None:
        return next((s for s in [*self.running, *self.waiting] if s.request_id == request_id), None)

    def next_batch(self) -> Batch:
        """All decodes, then chunks of prompts in the order of arrival while there is room."""
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
        for sequence in prompts:
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
        """Forget a sequence, wherever it is, and give its pages back."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self._cache.release(sequence.slot)
        sequence.slot = None

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._config.max_num_seqs:
            sequence = self.waiting[0]
            if not self._cache.can_admit(sequence.pages_needed):
                return  # later ones must not overtake: a long prompt would wait for ever
            self.waiting.popleft()
            sequence.slot = self._cache.admit(sequence.pages_needed)
            sequence.admitted = time.monotonic()
            self.running.append(sequence)

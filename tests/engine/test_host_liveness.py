"""Random requests of every kind in small pools with small hosts: all end, whatever is swapped or aborted.

The model is left out: tables, promises, scheduler and engine are the real ones.
"""

import random
from typing import Any

import numpy as np
import pytest
import torch

from engine.attention import ChunkRun
from engine.engine import Engine
from engine.messages import FinishReason, Submit
from engine.runner import StepResult
from engine.scheduler import Batch, ChunkPlan
from engine.sequence import slot_of
from kvcache.cache import KVCache
from sparse.base import Chunk
from tests.tiny import greedy, plan, tiny_engine, tiny_model

PLANS = {
    "dense": {},
    "snapkv": {"kv": {"policy": "snapkv", "budget": 70, "query_window": 16}},
    "streaming": {"kv": {"policy": "streaming", "window": 120}},
}


class NoModel:
    """Takes pages as a forward does, keeps random tokens where a policy chooses, and samples random ones."""

    def __init__(self, cache: KVCache, seed: int) -> None:
        self._cache = cache
        self._random = random.Random(seed)
        self.fails = False  # the newest step

    def run(self, batch: Batch) -> StepResult:
        if batch.decodes:
            self._cache.reserve_next([slot_of(sequence) for sequence in batch.decodes])
        for part in batch.chunks:
            self._cache.reserve(slot_of(part.sequence), part.end)
        self._cache.sync()
        self.fails = self._random.random() < 0.005
        if self.fails:
            raise RuntimeError("a step fails")
        runs = [(part, self._chunk_run(part)) for part in batch.chunks]
        sampled = [one for one in batch.decodes if one.computed + 1 == len(one.tokens)]
        for part in batch.chunks:
            sampled += part.sequence.choices if part.end == len(part.sequence.tokens) else []
        return StepResult({one: self._random.randrange(3, 250) for one in sampled}, runs)

    def _chunk_run(self, part: ChunkPlan) -> ChunkRun:
        sequence = part.sequence
        chunk = Chunk(part.start, part.length, sequence.prompt_length, sequence.total_length, 0)
        nothing = torch.empty(0, dtype=torch.int64)
        run = ChunkRun(chunk, sequence.plan, slice(0), nothing, dense=True)
        for _ in range(self._cache.num_layers):
            run.read_cells.append(torch.zeros(6))
            run.causal_cells.append(1)
            run.keep.append(None)
        budget = sequence.plan.card.budget or 0
        if sequence.plan.policy.compacts and part.end == sequence.prompt_length > budget:
            keep = torch.zeros(self._cache.num_kv_heads, part.end, dtype=torch.bool)
            keep[:, self._random.sample(range(part.end), budget)] = True
            run.keep = [keep] * self._cache.num_layers
        return run


class Crowd:
    """Submits and aborts at random, and counts ends."""

    def __init__(self, seed: int, network: Any) -> None:
        self.random = random.Random(seed)
        rows = 2 * 2
        pages = rows * self.random.randint(8, 12)
        self.tiny = tiny_engine(
            *(plan(name, **parts) for name, parts in PLANS.items()),
            network=network,
            num_pages=pages,
            host_pages=rows * self.random.randint(12, 60),
            host_columns=self.random.choice([0, 3]),
            share_prefixes=True,
            max_num_seqs=6,
            max_num_batched_tokens=256,
        )
        self.engine: Engine = self.tiny.engine
        self.runner = NoModel(self.tiny.cache, seed)
        self.engine._runner = self.runner  # type: ignore[assignment]
        self.open: dict[tuple[str, int], int] = {}
        self.ends: dict[FinishReason, int] = {}
        self.submitted = 0

    def submit(self) -> None:
        name, choices = f"{self.submitted}", self.random.choice([1] * 9 + [2])
        self.submitted += 1
        length = self.random.choice([30, 60, 125, 190, self.random.randint(1, 330)])
        tokens = np.full(length, self.random.choice([3, 3, 3, 4]))
        tokens[64 * self.random.randint(0, 5) :] = self.random.randint(5, 7)
        sampling = greedy(self.random.randint(100, 300), seed=self.submitted)
        chosen = self.random.choice(list(PLANS))
        for choice in range(choices):
            self.open[name, choice] = 0
        self.engine.submit(Submit(name, tuple(tokens.tolist()), length, chosen, sampling, choices=choices))

    def abort(self) -> None:
        if self.open:
            self.engine.abort(self.random.choice(list(self.open))[0])

    def step(self) -> None:
        for output in self.engine.step().outputs:
            if output.finish_reason is not None:
                del self.open[output.request_id, output.choice]
                self.ends[output.finish_reason] = self.ends.get(output.finish_reason, 0) + 1
                assert output.error is None or output.refused or self.runner.fails, output.error
        self.tiny.cache.check()


@pytest.fixture(scope="module")
def network() -> Any:
    return tiny_model(num_hidden_layers=2)


@pytest.mark.parametrize("seed", [0, 5, 7, 29])
def test_everybody_ends_once(network: Any, seed: int) -> None:
    crowd = Crowd(seed, network)
    for _ in range(400):
        if len(crowd.open) < 12 and crowd.random.random() < 0.3:
            crowd.submit()
        if crowd.random.random() < 0.02:
            crowd.abort()
        crowd.step()
    for _ in range(4000):
        if not crowd.engine.has_work:
            break
        crowd.step()
    assert not crowd.open and not crowd.engine.has_work
    assert crowd.ends[FinishReason.LENGTH] > 0 and crowd.engine.stats().swaps_out > 0
    crowd.tiny.assert_empty()

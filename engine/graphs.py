"""DecodeGraphs: whole decode steps, recorded once and started at once. Owns their inputs and outputs.

A step of plain calls starts a thousand kernels, each from Python; a recorded one is one call. What is
recorded has a size: so many rows, none longer than a bound. A batch takes the smallest that it fits, and what
is left of that is padding, which writes to a page of nobody and reads nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention import DecodeRun, ForwardBatch
from engine.kernels import Kernels
from engine.rope import Rope
from kvcache.cache import KVCache
from kvcache.decode import DecodeMethod, Full
from kvcache.padded import padded_step


@dataclass(frozen=True, slots=True, eq=False)
class StepTokens:
    """One new token of each of n sequences, and where these are."""

    tokens: NDArray[np.int64]  # [n] ids
    positions: NDArray[np.int64]  # [n]
    slots: NDArray[np.int64]  # [n]


@dataclass(frozen=True, slots=True, eq=False)
class StepOutputs:
    """What a step of B rows gives."""

    logits: Tensor  # [B, V]
    read: Tensor | None  # [2, B] int64: tokens read and readable; None = the method reads all

    def first(self, count: int) -> "StepOutputs":
        """Of the rows that are no padding."""
        return StepOutputs(self.logits[:count], None if self.read is None else self.read[:, :count])


class DecodeStep:
    """A decode step of fixed size, over inputs at a fixed address: the function that is recorded."""

    def __init__(
        self,
        model: Any,
        cache: KVCache,
        kernels: Kernels,
        rope: Rope,
        method: DecodeMethod,
        batch: int,
        bound: int,
    ) -> None:
        self.method, self.batch, self.bound = method, batch, bound
        self._model, self._cache, self._kernels, self._rope = model, cache, kernels, rope
        self._padding = len(cache.computed)  # the slot after the last one
        self._inputs = torch.empty(3, batch, dtype=torch.int64, device=cache.pool.k.device)
        nothing = np.empty(0, dtype=np.int64)
        self.fill(StepTokens(nothing, nothing, nothing))

    @property
    def name(self) -> str:
        return f"a decode step of {self.method}, {self.batch} rows of up to {self.bound} tokens"

    def fill(self, rows: StepTokens) -> None:
        """The next run is of these rows; all others are padding."""
        inputs = np.zeros((3, self.batch), dtype=np.int64)
        inputs[2] = self._padding
        inputs[:, : len(rows.slots)] = rows.tokens, rows.positions, rows.slots
        self._inputs.copy_(torch.from_numpy(inputs))

    def run(self) -> StepOutputs:
        """Nothing here depends on the host, so that it means the same whenever it is replayed."""
        tokens, positions, slots = self._inputs
        destinations, rows = padded_step(self._cache, slots, self.bound)
        step = DecodeRun(self.method, slice(0, self.batch), destinations, rows)
        logits = self._model(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            batch=ForwardBatch(self._cache, self._kernels, self._rope, positions, decodes=[step]),
        ).logits[0]
        return StepOutputs(logits, None if isinstance(self.method, Full) else step.read_counts())


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A step that was recorded."""

    step: DecodeStep
    outputs: StepOutputs  # of the last replay
    replay: Callable[[], None]

    def __call__(self, rows: StepTokens) -> StepOutputs:
        """The outputs of these rows, until the next call."""
        self.step.fill(rows)
        self.replay()
        return self.outputs.first(len(rows.slots))


class DecodeGraphs:
    """The graphs of all decode methods."""

    def __init__(self, graphs: list[Graph]) -> None:
        self._graphs = sorted(graphs, key=lambda graph: (graph.step.bound, graph.step.batch))

    def __len__(self) -> int:
        return len(self._graphs)

    def find(self, method: DecodeMethod, count: int, longest: int) -> Graph | None:
        """The smallest for so many rows of this method, none of which holds more than `longest` tokens."""
        for graph in self._graphs:
            step = graph.step
            if step.method == method and count <= step.batch and longest <= step.bound:
                return graph
        return None

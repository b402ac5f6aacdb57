"""Each recorded decode step against the same step run plainly, from the same pages, after all were recorded.

One that keeps what was true when it was recorded, or whose memory another took, gives something else.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.model import PAGE_SIZE
from engine.graphs import Graph, StepOutputs, StepTokens
from engine.self_check import TOLERANCES
from kvcache.cache import KVCache
from kvcache.pool import pages_for
from kvcache.state import NewKeys

log = logging.getLogger(__name__)

TRIAL_LENGTHS = (2000, 70, 128, 333)  # tokens of the sequences that a graph is tried on


def without_wrong(graphs: list[Graph], cache: KVCache) -> list[Graph]:
    """Those that agree with plain steps; the log names the others."""
    right = []
    with trial_sequences(cache) as slots:
        if not slots.size:
            log.warning("CUDA graphs: none is used: the cache has no room to try them")
            return []
        for graph in graphs:
            complaint = complaint_about(graph, slots[: graph.step.batch], cache)
            if complaint is None:
                right.append(graph)
            else:
                log.warning("CUDA graphs: %s runs without: %s", graph.step.name, complaint)
    return right


@contextmanager
def trial_sequences(cache: KVCache) -> Iterator[NDArray[np.int64]]:
    """Slots of sequences of random keys and values, as many as fit: about to decode."""
    generator = torch.Generator(cache.pool.k.device).manual_seed(0)
    longest = cache.table.host.shape[-1] * PAGE_SIZE - 1
    slots: list[int] = []
    try:
        for length in (min(length, longest) for length in TRIAL_LENGTHS):
            pages = cache.num_rows * pages_for(length + 1)
            if cache.can_admit(pages):
                slots.append(cache.admit(pages))
                _fill(cache, slots[-1], length, generator)
        index = np.array(slots, dtype=np.int64)
        cache.reserve_next(index)
        cache.sync()
        yield index
    finally:
        for slot in slots:
            cache.release(slot)


def _fill(cache: KVCache, slot: int, length: int, generator: torch.Generator) -> None:
    cache.reserve(slot, length)
    cache.sync()
    destinations = cache.prefill_destinations(slot, 0, length)
    positions = torch.arange(length, device=destinations.device)
    shape = (2, cache.num_kv_heads, length, cache.pool.k.shape[2])
    for layer in range(cache.num_layers):
        k, v = torch.randn(shape, generator=generator, device=destinations.device, dtype=cache.dtype)
        cache.write(k, v, destinations[layer])
        cache.keep_up(NewKeys(layer, k, destinations[layer], positions, None, is_chunk=True))
    cache.advance(slot, length)


@dataclass(frozen=True, slots=True, eq=False)
class _Written:
    """What a step changes: the pages of its new tokens, and the state of its slots."""

    pages: list[Tensor]
    slots: list[list[Tensor]]


def complaint_about(graph: Graph, slots: NDArray[np.int64], cache: KVCache) -> str | None:
    """How a replay differs from the same step run plainly, or None."""
    pages = cache.decode_destinations(slots).flatten() // PAGE_SIZE
    before = _written(cache, pages, slots)
    positions = cache.computed[slots]
    rows = StepTokens(positions % 7, positions, slots)
    graph.step.fill(rows)
    outputs = graph.step.run().first(len(slots))
    wanted = [*_tensors(outputs), *_written(cache, pages, slots).pages]
    _write_back(cache, pages, slots, before)
    outputs = graph(rows)
    found = [*_tensors(outputs), *_written(cache, pages, slots).pages]
    _write_back(cache, pages, slots, before)
    tolerance = TOLERANCES[cache.dtype]
    for got, want in zip(found, wanted, strict=True):
        error = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-9))
        if not error <= tolerance:  # NaN never passes
            return f"it differs from plain calls by {error:.1e} of the norm, {tolerance:.0e} is allowed"
    return None


def _tensors(outputs: StepOutputs) -> list[Tensor]:
    found = [outputs.logits] if outputs.read is None else [outputs.logits, outputs.read]
    return [tensor.clone() for tensor in found]  # the next step overwrites them


def _written(cache: KVCache, pages: Tensor, slots: NDArray[np.int64]) -> _Written:
    """A copy. pages int64 [n]."""
    return _Written(
        [tensor.index_select(0, pages) for tensor in cache.pool.carried],
        [cache.states.save_slot(int(slot)) for slot in slots],
    )


def _write_back(cache: KVCache, pages: Tensor, slots: NDArray[np.int64], written: _Written) -> None:
    for tensor, content in zip(cache.pool.carried, written.pages, strict=True):
        tensor.index_copy_(0, pages, content)
    for slot, state in zip(slots, written.slots, strict=True):
        cache.states.load_slot(int(slot), state)

"""At start: which decode steps are recorded as graphs, and within how much memory."""

import logging
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from configs.model import PAGE_SIZE
from engine.graph_check import without_wrong
from engine.graphs import DecodeGraphs, DecodeStep, Graph
from engine.self_check import in_a_line
from kvcache.cache import KVCache
from kvcache.decode import DecodeMethod, Full

log = logging.getLogger(__name__)

LEAST_BOUND = 4096  # tokens, of methods that choose: looking for the best costs by the bound
BOUND_GROWTH = 4


class Recorder(Protocol):
    """Makes graphs: see engine/cuda_graph.py."""

    @property
    def used(self) -> int:
        """Bytes that recording has taken so far."""

    def warm_up(self, step: DecodeStep) -> int:
        """Run it once without recording. Bytes that it takes at its peak."""

    def record(self, step: DecodeStep) -> Graph:
        """Raises if it cannot be recorded."""


class MakeStep(Protocol):
    """A step of this method, so many rows and this bound."""

    def __call__(self, method: DecodeMethod, batch: int, bound: int) -> DecodeStep: ...


@torch.inference_mode()
def recorded(
    make: MakeStep,
    methods: Iterable[DecodeMethod],
    cache: KVCache,
    recorder: Recorder,
    *,
    largest: int,
    memory: int,
) -> DecodeGraphs:
    """Graphs of up to `largest` rows, in at most about `memory` bytes; what is left out runs without.

    The cache must have no sequence, and is left as it was.
    """
    graphs: list[Graph] = []
    peak = 0  # of what was recorded: its memory is there for the next ones, too
    max_length = cache.table.host.shape[-1] * PAGE_SIZE
    left_out = 0
    for method, batch, bound in sizes(methods, max_length, largest):
        step = make(method, batch, bound)
        try:
            needed = recorder.warm_up(step)
            if recorder.used + max(0, needed - peak) <= memory:
                graphs.append(recorder.record(step))
                peak = max(peak, needed)
            else:
                left_out += 1
        except torch.OutOfMemoryError:
            left_out += 1
        except Exception as error:  # whatever a device, a compiler or a method raises: plain calls serve
            words = "CUDA graphs: %s cannot be recorded, nor what follows: %s"
            log.warning(words, step.name, in_a_line(error))
            break
    right = without_wrong(graphs, cache)
    log.info(
        "CUDA graphs: %d decode steps of up to %d sequences recorded in %.0f MiB of %.0f%s",
        len(right), largest, recorder.used / 2**20, memory / 2**20,
        f"; {left_out} did not fit" if left_out else "",
    )  # fmt: skip
    return DecodeGraphs(right)


def sizes(
    methods: Iterable[DecodeMethod], max_length: int, largest: int
) -> Iterator[tuple[DecodeMethod, int, int]]:
    """Method, rows and bound of every graph. The largest batch goes first: the others fit in its memory.

    Reading all goes by what a row holds, whatever the bound: one bound serves. What is simplest goes first:
    should a method turn out to be impossible to record, the others are there.
    """
    distinct: list[DecodeMethod] = []
    for method in methods:
        if method not in distinct:
            distinct.append(method)
    for method in sorted(distinct, key=lambda one: not isinstance(one, Full)):
        for bound in bounds(method, max_length):
            for batch in batches(largest):
                yield method, batch, bound


def batches(largest: int) -> list[int]:
    """Powers of two up to the largest, and the largest: descending."""
    return sorted({largest, *(1 << i for i in range(largest.bit_length()))}, reverse=True)


def bounds(method: DecodeMethod, max_length: int) -> list[int]:
    """Tokens that rows may hold, ascending."""
    if isinstance(method, Full):
        return [max_length]
    found, bound = [], LEAST_BOUND
    while bound < max_length:
        found.append(bound)
        bound *= BOUND_GROWTH
    return [*found, max_length]

"""Decode steps as CUDA graphs: recorded at start, where there is a GPU and its kernels serve."""

import logging
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

import kvcache.decode
from configs.errors import ConfigError
from configs.schema import EngineConfig
from engine.graph_recording import recorded
from engine.graphs import DecodeGraphs, DecodeStep, Graph
from engine.kernels import Kernels
from engine.rope import Rope
from kvcache.cache import KVCache
from kvcache.decode import DecodeMethod

log = logging.getLogger(__name__)


def check_graphs(asked: str, device: str) -> None:
    """Raises ConfigError where graphs were asked for and cannot be."""
    if asked == "on" and device != "cuda":
        raise ConfigError(f"engine.cuda_graphs: on needs a CUDA device, this is {device}; leave it at auto")


def graph_bytes(config: EngineConfig, device: torch.device) -> int:
    """What graphs may take of the device beside weights and pages."""
    return config.cuda_graph_memory if device.type == "cuda" and config.cuda_graphs != "off" else 0


def cuda_graphs(
    config: EngineConfig,
    network: Any,
    methods: Iterable[DecodeMethod],
    cache: KVCache,
    kernels: Kernels,
) -> DecodeGraphs:
    """Those of these methods; none where they are off or impossible, as the log says."""
    device = cache.pool.k.device
    if config.cuda_graphs == "off" or device.type != "cuda":
        return DecodeGraphs([])
    if kernels.attend_rows is kvcache.decode.attend_rows:
        log.warning("CUDA graphs: none: torch attends in decode steps, and asks the device for lengths")
        graphs = DecodeGraphs([])
    else:
        graphs = recorded(
            partial(DecodeStep, network, cache, kernels, Rope.of(network)),
            methods,
            cache,
            CudaRecorder(device),
            largest=min(config.cuda_graph_batch, len(cache.computed)),
            memory=config.cuda_graph_memory,
        )
    if config.cuda_graphs == "on" and not len(graphs):
        raise ConfigError(
            "engine.cuda_graphs: on, and not one decode step could be recorded; the log says why."
            " Give more engine.cuda_graph_memory, or leave it at auto"
        )
    return graphs


class CudaRecorder:
    """Its graphs may be replayed one after another, never two at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._free = self._free_bytes()

    @property
    def used(self) -> int:
        """Bytes of the GPU that recording has taken so far, loaded kernels included."""
        return max(0, self._free - self._free_bytes())

    def warm_up(self, step: DecodeStep) -> int:
        """Run it outside of a graph, so that kernels are compiled and libraries start. Bytes at its peak."""
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(2):  # the second finds everything compiled: what it takes is what a graph takes
                step.run()
        torch.cuda.current_stream(self._device).wait_stream(side)
        torch.cuda.synchronize(self._device)
        return int(torch.cuda.max_memory_allocated(self._device)) - before

    def record(self, step: DecodeStep) -> Graph:
        """Its kernels, with their arguments, as one graph. RuntimeError if something waits for the device."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            # thread_local: what other threads do with the device meanwhile is none of this graph's business
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = step.run()
        finally:
            torch.cuda.set_stream(stream)  # a recording that failed leaves its own behind
        return Graph(step, outputs, graph.replay)

    def _free_bytes(self) -> int:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self._device)[0])

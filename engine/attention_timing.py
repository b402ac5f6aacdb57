"""AttentionTimer: what one chunk of a prompt costs in attention under a plan, sparse and dense."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from configs.features import NO_FEATURES
from configs.model import ModelInfo
from engine.attention import RECALL_LAYERS, ChunkRun, ForwardBatch, Layer
from engine.kernels import Kernels
from engine.plans import ResolvedPlan
from engine.rope import Rope
from kvcache.cache import KVCache
from kvcache.pool import pages_for
from sparse.base import Chunk
from sparse.dense import Dense

ROUNDS = 3  # whose median counts
PATIENCE = 2.0  # seconds after which no further round begins: what takes long is steady enough

# What is planted, as logits. With them, at a head size of 64, the shipped plan minference reads 0.43 of the
# last chunk of 8,192 tokens and xattention 0.52. Of a novel, minference reads 0.38 of 7,936 tokens (SmolLM2).
NUM_SINKS = 4
SINK = 10.0
HEAVY = 6.0  # of a share of all keys
HEAVY_SHARE = 1 / 128
LOCAL = 10.0  # of a query's own position, falling with the logarithm of the distance
WAVES = (4, 14)  # logarithms of the shortest and the longest wave, in tokens, that tell distances apart
NOISE = 0.7  # standard deviation of every number


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds that the same attention takes in two ways."""

    dense: float
    sparse: float


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """A chunk at the end of a prompt: its queries, and keys and values from the beginning on."""

    q: Tensor  # [Hq, Tq, D]
    k: Tensor  # [Hkv, N, D]
    v: Tensor  # [Hkv, N, D]


class AttentionTimer:
    """Runs chunks through the attention that serves, in up to four layers that a plan does not read densely.

    What is timed is all that a sparse prefill adds and all that it saves: selecting, the policy's mask, the
    samples of recall in their share of layers, attention. Features of layers beyond windows (softcap, sinks)
    are left out. Borrows pages of the cache, which must have no sequence, and leaves it as it was.
    """

    def __init__(
        self,
        plan: ResolvedPlan,
        model: ModelInfo,
        cache: KVCache,
        kernels: Kernels,
        rope: Rope,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._plan, self._model, self._cache = plan, model, cache
        self._kernels, self._rope, self._clock = kernels, rope, clock
        self._device = cache.pool.k.device
        scale = model.head_dim**-0.5
        self._layers = [Layer(index, scale, NO_FEATURES) for index in layers_to_time(plan)]

    @torch.inference_mode()
    def compare(self, start: int, length: int, *, rounds: int = ROUNDS) -> Times:
        """Of the last chunk of a prompt, `length` tokens from `start` on: medians of interleaved rounds."""
        total = start + length
        cache = self._cache
        slot = cache.admit(cache.num_rows * pages_for(total))
        try:
            cache.reserve(slot, total)
            cache.sync()
            destinations = cache.prefill_destinations(slot, 0, total)
            inputs = planted(self._model, total, length, cache.dtype, self._device)
            for layer in self._layers:
                cache.write(inputs.k, inputs.v, destinations[layer.index])
            chunk = Chunk(start, length, prompt_length=total, total_length=total + 1, slot=slot)
            seconds: dict[bool, list[float]] = {True: [], False: []}
            began = self._clock()
            for turn in range(rounds):
                if turn and self._clock() - began > PATIENCE:
                    break
                for dense, found in seconds.items():
                    found.append(self._seconds(inputs, chunk, destinations[..., start:], dense=dense))
        finally:
            cache.release(slot)
        return Times(median(seconds[True]), median(seconds[False]))

    def _seconds(self, inputs: Inputs, chunk: Chunk, destinations: Tensor, *, dense: bool) -> float:
        """Of one pass over the layers. destinations [L, Hkv, Tq]."""
        reach = self._plan.policy.reach(chunk.total_length)
        run = ChunkRun(
            chunk,
            self._plan,
            slice(0, chunk.length),
            destinations,
            dense,
            None if reach is None else reach.to(self._device),
        )
        positions = torch.arange(chunk.start, chunk.start + chunk.length, device=self._device)
        forward = ForwardBatch(self._cache, self._kernels, self._rope, positions, runs=[run])
        self._synchronize()
        began = self._clock()
        for layer in self._layers:
            forward.attend(layer, inputs.q, inputs.k[:, chunk.start :], inputs.v[:, chunk.start :])
        self._synchronize()
        return self._clock() - began

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def layers_to_time(plan: ResolvedPlan) -> list[int]:
    """Of the layers that are not dense, one from each turn of recall's samples, spread over the depth."""
    layers = [layer for layer, method in enumerate(plan.methods) if not isinstance(method, Dense)]
    turns = [[layer for layer in layers if layer % RECALL_LAYERS == turn] for turn in range(RECALL_LAYERS)]
    return [of[(2 * turn + 1) * len(of) // (2 * RECALL_LAYERS)] for turn, of in enumerate(turns) if of]


def planted(model: ModelInfo, total: int, length: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Random inputs that look somewhere, as attention does: at sinks, nearby, and at a few heavy columns.

    No text looks exactly like this: how much of it a method reads that goes by content is a guess. What
    choosing costs is not.
    """
    generator = torch.Generator(device).manual_seed(0)
    heads, kv_heads, size = model.num_query_heads, model.num_kv_heads, model.head_dim

    def noise(*shape: int) -> Tensor:
        return NOISE * torch.randn(*shape, generator=generator, dtype=dtype, device=device)

    q, k, v = noise(heads, length, size), noise(kv_heads, total, size), noise(kv_heads, total, size)
    weight = HEAVY * (torch.rand(kv_heads, total, generator=generator, device=device) < HEAVY_SHARE)
    weight[:, :NUM_SINKS] = SINK
    q[..., 0] = size**0.5  # the scale of attention takes it back
    k[..., 0] += weight.to(dtype)
    waves = max(1, size // 4)
    periods = torch.logspace(*WAVES, waves, base=2, device=device)
    angles = torch.arange(total, device=device)[:, None] * (2 * torch.pi / periods)  # [N, waves]
    wave = torch.cat((angles.cos(), angles.sin()), 1) * (LOCAL * size**0.5 / waves) ** 0.5
    q[..., 1 : 1 + 2 * waves] += wave[total - length :].to(dtype)
    k[..., 1 : 1 + 2 * waves] += wave.to(dtype)
    return Inputs(q, k, v)

"""Who serves dense chunks on a GPU: flash-attn or cuDNN, where they are right and faster, else our kernel."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from statistics import median

import torch
from torch import Tensor

from configs.model import ModelInfo
from engine.kernels import Kernels
from engine.self_check import TOLERANCES, checked, in_a_line, one_sequence
from kvcache.cache import KVCache
from sparse.attention import Attend
from sparse.base import Chunk
from sparse.kernels.cudnn_dense import CudnnDense, cudnn_attention
from sparse.kernels.flash_dense import FlashDense
from sparse.selection import dense

log = logging.getLogger(__name__)

LENGTH = 8192  # tokens of the prompt whose last chunk is tried and timed
CHUNK = 2048
ROUNDS = 5  # whose median counts, taking turns


def _flash(other: Attend) -> Attend:
    return FlashDense(import_module("flash_attn").flash_attn_func, other)


def _cudnn(other: Attend) -> Attend:
    if not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        raise ImportError("torch was built without cuDNN, or does not find it")
    return CudnnDense(cudnn_attention, other)


CANDIDATES: dict[str, Callable[[Attend], Attend]] = {"flash-attn": _flash, "cuDNN": _cudnn}


def with_fastest_dense(
    kernels: Kernels,
    model: ModelInfo,
    dtype: torch.dtype,
    device: torch.device,
    page_dtype: torch.dtype | None = None,
) -> Kernels:
    """These kernels, with another's attention for dense chunks where that is better. As the log says."""
    if device.type != "cuda":
        return kernels
    ways = {"ours": kernels}
    trial: _Trial | None = None
    for name, make in CANDIDATES.items():
        try:
            candidate = replace(kernels, attend=make(kernels.attend))
        except (ImportError, AttributeError) as error:
            log.info("dense prefill: %s cannot be used (%s)", name, error)
            continue
        trial = trial or _draw(model, dtype, device)
        complaint = _complaint(candidate.attend, kernels.attend, trial)
        if complaint is not None:
            log.warning("dense prefill: %s is not used: %s", name, complaint)
        elif checked(candidate, model, dtype, device, page_dtype) == candidate:
            ways[name] = candidate  # else the log says what was wrong
    if trial is None or len(ways) == 1:
        return kernels
    seconds = _seconds([way.attend for way in ways.values()], trial)
    times = dict(zip(ways, seconds, strict=True))
    words = ", ".join(f"{name} {1e3 * found:.2f} ms" for name, found in times.items())
    log.info("dense prefill of %d tokens at %d: %s", CHUNK, LENGTH - CHUNK, words)
    return ways[min(times, key=lambda name: times[name])]


@dataclass(frozen=True, slots=True, eq=False)
class _Trial:
    """The last chunk of a random prompt in one layer of a model."""

    cache: KVCache
    q: Tensor  # [Hq, CHUNK, D]

    def run(self, attend: Attend) -> Tensor:
        keys = self.cache.view(0, 0, LENGTH)  # a new one each time: views remember what they gathered
        chunk = Chunk(LENGTH - CHUNK, CHUNK, LENGTH, LENGTH + 1, slot=0)
        return attend(self.q, keys, chunk, dense(self.q.device), scale=self.q.shape[2] ** -0.5).out


def _draw(model: ModelInfo, dtype: torch.dtype, device: torch.device) -> _Trial:
    cache, size = one_sequence(model, LENGTH, dtype, device), model.head_dim
    k, v = torch.randn(2, model.num_kv_heads, LENGTH, size, device=device, dtype=dtype)
    cache.write(k, v, cache.prefill_destinations(0, 0, LENGTH)[0])
    return _Trial(cache, torch.randn(model.num_query_heads, CHUNK, size, device=device, dtype=dtype))


def _complaint(theirs: Attend, ours: Attend, trial: _Trial) -> str | None:
    """What is wrong with another's attention of this chunk, or None."""
    want = trial.run(ours)
    try:
        got = trial.run(theirs)
    except Exception as error:  # whatever a library raises where it cannot: ours serves
        return in_a_line(error)
    error_norm = float((got.float() - want.float()).norm() / want.float().norm())
    if not error_norm <= TOLERANCES[want.dtype]:  # NaN never passes
        return f"it differs from ours by {error_norm:.1e} of the norm"
    return None


def _seconds(ways: list[Attend], trial: _Trial) -> list[float]:
    """Median time of this chunk, each way."""
    device = trial.q.device
    found: list[list[float]] = [[] for _ in ways]
    for index in range(-1, ROUNDS):  # the first is not counted: it compiles
        for attend, times in zip(ways, found, strict=True):
            torch.cuda.synchronize(device)
            began = time.perf_counter()
            trial.run(attend)
            torch.cuda.synchronize(device)
            if index >= 0:
                times.append(time.perf_counter() - began)
    return [median(times) for times in found]

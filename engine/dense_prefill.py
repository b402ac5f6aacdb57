"""Who serves dense chunks on a GPU: flash-attn, where it is here, right and faster, else our kernel."""

import logging
import time
from dataclasses import replace
from importlib import import_module
from statistics import median

import torch

from configs.model import PAGE_SIZE, ModelInfo
from engine.kernels import Attend, Kernels
from engine.self_check import checked
from kvcache.cache import CacheSize, KVCache
from kvcache.pool import pages_for
from kvcache.state import StateRegistry
from sparse.base import Chunk
from sparse.kernels.flash_dense import FlashDense
from sparse.selection import dense

log = logging.getLogger(__name__)

LENGTH = 8192  # tokens of the prompt whose last chunk is timed
CHUNK = 2048
ROUNDS = 5  # whose median counts, taking turns


def with_flash(
    kernels: Kernels,
    model: ModelInfo,
    dtype: torch.dtype,
    device: torch.device,
    page_dtype: torch.dtype | None = None,
) -> Kernels:
    """These kernels, with flash-attn for dense chunks where that is better. As the log says."""
    if device.type != "cuda":
        return kernels
    try:
        flash = import_module("flash_attn").flash_attn_func
    except (ImportError, AttributeError) as error:
        log.info("dense prefill: our kernel; flash-attn cannot be imported (%s)", error)
        return kernels
    candidate = replace(kernels, attend=FlashDense(flash, kernels.attend))
    if checked(candidate, model, dtype, device, page_dtype) != candidate:
        return kernels  # the log says what was wrong
    ours, theirs = _seconds([kernels.attend, candidate.attend], model, dtype, device)
    log.info("dense prefill of %d tokens at %d: ours %.2f ms, flash-attn %.2f ms",
             CHUNK, LENGTH - CHUNK, 1e3 * ours, 1e3 * theirs)  # fmt: skip
    return candidate if theirs < ours else kernels


def _seconds(ways: list[Attend], model: ModelInfo, dtype: torch.dtype, device: torch.device) -> list[float]:
    """Median time of one dense chunk of one layer, each way."""
    pages = model.num_kv_heads * pages_for(LENGTH)
    cache = KVCache(
        replace(model, num_layers=1),
        CacheSize(pages, 1, LENGTH + PAGE_SIZE),
        dtype=dtype,
        device=device,
        states=StateRegistry(),
    )
    slot = cache.admit(pages)
    cache.reserve(slot, LENGTH)
    cache.sync()
    q = torch.randn(model.num_query_heads, CHUNK, model.head_dim, device=device, dtype=dtype)
    chunk = Chunk(LENGTH - CHUNK, CHUNK, LENGTH, LENGTH + 1, slot=slot)
    found: list[list[float]] = [[] for _ in ways]
    for index in range(-1, ROUNDS):  # the first is not counted: it compiles
        for attend, times in zip(ways, found, strict=True):
            keys = cache.view(slot, 0, LENGTH)  # a new one each time: views remember what they gathered
            torch.cuda.synchronize(device)
            began = time.perf_counter()
            attend(q, keys, chunk, dense(device), scale=model.head_dim**-0.5)
            torch.cuda.synchronize(device)
            if index >= 0:
                times.append(time.perf_counter() - began)
    return [median(times) for times in found]

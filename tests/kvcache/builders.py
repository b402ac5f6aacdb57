"""Small caches, filled with values that say which token they are."""

import torch
from torch import Tensor

from configs.model import ModelInfo
from kvcache.cache import CacheSize, KVCache
from kvcache.pool import pages_for
from kvcache.state import StateRegistry
from kvcache.view import KeyView

CPU = torch.device("cpu")


def make_model(*, layers: int = 2, query_heads: int = 4, kv_heads: int = 2, head_dim: int = 4) -> ModelInfo:
    return ModelInfo("tiny", layers, query_heads, kv_heads, head_dim, vocab_size=16, max_length=4096)


def make_cache(
    *,
    num_pages: int = 64,
    num_slots: int = 4,
    max_length: int = 448,
    host_pages: int = 0,
    host_columns: int = 0,
    model: ModelInfo | None = None,
    states: StateRegistry | None = None,
    device: torch.device = CPU,
) -> KVCache:
    return KVCache(
        model or make_model(),
        CacheSize(num_pages, num_slots, max_length, host_pages, host_columns),
        dtype=torch.float32,
        device=device,
        states=states or StateRegistry(),
    )


def random_tokens(cache: KVCache, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values [L, Hkv, length, D]."""
    shape = (cache.num_layers, cache.num_kv_heads, length, cache.pool.k.shape[2])
    return torch.randn(shape), torch.randn(shape)


def prefill(cache: KVCache, slot: int, k: Tensor, v: Tensor) -> None:
    """One chunk, as a forward does it. k, v [L, Hkv, T, D]."""
    start, length = int(cache.computed[slot]), k.shape[2]
    cache.reserve(slot, start + length)
    cache.sync()
    destinations = cache.prefill_destinations(slot, start, length)
    for layer in range(cache.num_layers):
        cache.write(k[layer], v[layer], destinations[layer])
    cache.advance(slot, length)


def decode(cache: KVCache, slots: list[int], k: Tensor, v: Tensor) -> None:
    """One token of each slot, as a forward does it. k, v [L, B, Hkv, D]."""
    cache.reserve_next(slots)
    cache.sync()
    destinations = cache.decode_destinations(slots)
    for layer in range(cache.num_layers):
        cache.write(k[layer], v[layer], destinations[layer])
    cache.advance(slots, 1)


def filled(cache: KVCache, length: int, pages: int | None = None) -> tuple[int, Tensor, Tensor]:
    """A slot whose prompt is computed, and its keys and values [L, Hkv, length, D]."""
    slot = cache.admit(pages or cache.num_layers * cache.num_kv_heads * pages_for(length))
    k, v = random_tokens(cache, length)
    prefill(cache, slot, k, v)
    return slot, k, v


def view_of(k: Tensor, v: Tensor) -> KeyView:
    """One layer of one sequence in shuffled pages, padding poisoned. k, v [Hkv, N, D]."""
    heads, length, head_dim = k.shape
    width = pages_for(length)
    pages = torch.randperm(heads * width + 3)[: heads * width].view(heads, width).int()
    pools = []
    for tokens in (k, v):
        pool = torch.full((heads * width + 3, 64, head_dim), float("nan"))
        padded = torch.full((heads, width * 64, head_dim), float("nan"))
        padded[:, :length] = tokens
        pool[pages.flatten().long()] = padded.view(heads * width, 64, head_dim)
        pools.append(pool)
    return KeyView(
        k_pool=pools[0],
        v_pool=pools[1],
        dtype=pools[0].dtype,
        pages=pages,
        num_tokens=length,
        num_held=torch.full((heads,), length, dtype=torch.int32),
        max_held=length,
        layer=0,
        has_holes=False,
    )

"""The cache moves keys and values with what it was given."""

from dataclasses import replace

import torch
from torch import Tensor

from kvcache.cache import CacheSize, KVCache
from kvcache.moves import TORCH_MOVES
from kvcache.pool import PagePool
from kvcache.state import StateRegistry
from tests.kvcache.builders import CPU, filled, make_model


def test_tokens_are_stored_and_compacted_by_the_moves_of_the_cache() -> None:
    model, calls = make_model(), []

    def store(pool: PagePool, k: Tensor, v: Tensor, destinations: Tensor) -> None:
        calls.append("store")
        TORCH_MOVES.store(pool, k, v, destinations)

    def move_kept(
        pool: PagePool, keep: Tensor, counts: Tensor, old: Tensor, new: Tensor, ids: Tensor
    ) -> None:
        calls.append("move_kept")
        TORCH_MOVES.move_kept(pool, keep, counts, old, new, ids)

    cache = KVCache(
        model,
        CacheSize(num_pages=16, num_slots=1, max_length=128),
        dtype=torch.float32,
        device=CPU,
        states=StateRegistry(),
        moves=replace(TORCH_MOVES, store=store, move_kept=move_kept),
    )
    slot, k, _ = filled(cache, 100)
    assert calls == ["store"] * model.num_layers
    cache.compact(slot, torch.arange(100).expand(model.num_layers, model.num_kv_heads, 100) % 2 == 1)
    assert calls[model.num_layers :] == ["move_kept"] * model.num_layers
    first = cache.table.host[slot, 0, 0, 0]
    assert torch.equal(cache.pool.k[first, :50], k[0, 0, 1::2])

"""Moves: how keys and values come into pages and from page to page; in torch, or by kernels of the device."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from configs.quantised import quantise
from kvcache import compaction
from kvcache.pool import PagePool


class Store(Protocol):
    """New tokens into pages: see `store`."""

    def __call__(self, pool: PagePool, k: Tensor, v: Tensor, destinations: Tensor) -> None: ...


class MoveKept(Protocol):
    """Kept tokens of a layer to the front of new pages: see kvcache.compaction.move_kept."""

    def __call__(
        self, pool: PagePool, keep: Tensor, counts: Tensor, old: Tensor, new: Tensor, ids: Tensor
    ) -> None: ...


def store(pool: PagePool, k: Tensor, v: Tensor, destinations: Tensor) -> None:
    """Write tokens k, v [A, C, D] of any strides; destinations int64 [A, C], page * PAGE_SIZE + offset.

    Where pages hold codes, tokens are quantised on their way in, each by itself.
    """
    for pages, scales, tokens in ((pool.k, pool.k_scales, k), (pool.v, pool.v_scales, v)):
        if scales is not None:
            tokens, own = quantise(tokens, pages.dtype)
            scales.flatten().index_put_((destinations,), own)
        pages.flatten(0, 1).index_put_((destinations,), tokens)


@dataclass(frozen=True, slots=True)
class Moves:
    """What the cache moves with."""

    store: Store = store
    move_kept: MoveKept = compaction.move_kept


TORCH_MOVES = Moves()

"""Moving keys and values between pages: rows that keep some of their tokens, and copies of whole pages."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.model import PAGE_SIZE
from kvcache.pool import PagePool


def own_pages(
    pool: PagePool, pages: NDArray[np.int32], counts: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Pages for `counts` tokens per row that the row may write: its private ones in order, then new ones.

    Pages that others read are never written. pages [Hkv, P], counts [Hkv] -> own [Hkv, P], and the pages
    that the row no longer needs [any]; -1 = none in both. References are the caller's to give back.
    """
    needed = -(-counts // PAGE_SIZE)
    private = (pages >= 0) & (pool.references[pages] == 1)
    order = np.argsort(~private, axis=-1, kind="stable")
    own = np.take_along_axis(pages, order, axis=-1)
    place = np.arange(pages.shape[-1])
    staying = place < np.minimum(needed, private.sum(-1))[:, None]
    leaving = own[~staying]
    own[~staying] = -1
    missing = (place < needed[:, None]) & ~staying
    own[missing] = pool.allocate(int(missing.sum()))
    return own, leaving


def move_kept(pool: PagePool, keep: Tensor, counts: Tensor, old: Tensor, new: Tensor, ids: Tensor) -> None:
    """Copy the kept tokens from the old pages to the front of the new ones, which may overlap the old.

    keep [Hkv, N] bool, counts [Hkv] its sums, old [Hkv, P] by block, new [Hkv, P] by place; ids [Hkv, K]
    receives the positions of the kept tokens. The temporary is what one layer keeps.
    """
    head, position = keep.nonzero(as_tuple=True)  # ascending in each head
    first = counts.cumsum(0, dtype=torch.int64) - counts
    place = torch.arange(len(head), device=keep.device) - first[head]
    source = old[head, position // PAGE_SIZE].long() * PAGE_SIZE + position % PAGE_SIZE
    target = new[head, place // PAGE_SIZE].long() * PAGE_SIZE + place % PAGE_SIZE
    for tokens in pool.by_token:
        flat = tokens.flatten(0, 1)
        flat.index_copy_(0, target, flat.index_select(0, source))
    ids[head, place] = position.int()


def copy_pages(pool: PagePool, source: NDArray[np.int32], target: NDArray[np.int32]) -> None:
    """Whole pages, with all that they carry. source, target [n]; no target is a source."""
    of, to = (torch.from_numpy(pages).long().to(pool.k.device) for pages in (source, target))
    for tokens in pool.carried:
        tokens.index_copy_(0, to, tokens.index_select(0, of))

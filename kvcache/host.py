"""HostArena: a bounded second pool, in the memory of the host. Holds what the first has no room for.

A page of it has one owner: a sequence that is out, or a column that left the pool. Everything that a page
carries comes along, bit for bit. Beside a pool on a GPU the arena is pinned memory; beside one on a CPU it is
just more memory, which is of use where the pool is meant to stay small.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcache.holdings import Contents
from kvcache.pool import PagePool

PIECE_BYTES = 64 * 2**20  # copied at once: what a copy may take of a device whose memory is full


class ArenaFull(RuntimeError):
    """More pages were to be saved than the arena has free. Nothing was copied."""


@dataclass(frozen=True, slots=True, eq=False)
class Swapped:
    """All that a sequence held, in the arena, until it comes back or is forgotten."""

    contents: Contents  # by page of the arena
    slot_state: list[Tensor]
    keys: list[bytes]  # of the columns it had pinned: what is there of them still is borrowed again
    tokens: NDArray[np.int32]  # of those columns
    promised: int  # pages it needs to come back
    most: int  # pages it could be promised in the end

    @property
    def pages(self) -> NDArray[np.int32]:
        """Of the arena."""
        return self.contents.pages[self.contents.pages >= 0]


class HostArena:
    """`num_pages` pages like those of a pool, handed out by id."""

    def __init__(self, num_pages: int, pool: PagePool) -> None:
        self._pool = pool
        self._is_free = np.ones(num_pages, dtype=bool)
        self._tensors = [_like(tensor, num_pages) for tensor in pool.carried]

    @property
    def num_pages(self) -> int:
        return self._is_free.size

    @property
    def num_free(self) -> int:
        return int(self._is_free.sum())

    def save(self, pages: NDArray[np.int32]) -> NDArray[np.int32]:
        """Copies of these pages of the pool, in pages that nobody had: ids in the same order."""
        host = np.flatnonzero(self._is_free)[: pages.size].astype(np.int32)  # lowest first: they lie in runs
        if host.size < pages.size:
            raise ArenaFull(
                f"{pages.size} pages are to be saved, {self.num_free} of {self.num_pages} are free"
            )
        for saved, tensor in zip(self._tensors, self._pool.carried, strict=True):
            of = torch.from_numpy(pages).long().to(tensor.device)
            for run, part in _pieces(host, tensor):
                saved[run].copy_(tensor.index_select(0, of[part]), non_blocking=True)
        self._wait()
        self._is_free[host] = False
        return host

    def load(self, host: NDArray[np.int32], pages: NDArray[np.int32]) -> None:
        """Copy pages of the arena to these of the pool. They stay in the arena until they are released."""
        assert not self._is_free[host].any(), "loaded pages that nobody saved"
        for saved, tensor in zip(self._tensors, self._pool.carried, strict=True):
            to = torch.from_numpy(pages).long().to(tensor.device)
            for run, part in _pieces(host, tensor):
                tensor.index_copy_(0, to[part], saved[run].to(tensor.device, non_blocking=True))
        self._wait()  # released pages may be written at once

    def release(self, host: NDArray[np.int32]) -> None:
        """Whose copies these were needs them no more."""
        assert not self._is_free[host].any(), "released pages that nobody saved"
        self._is_free[host] = True

    def check(self, owned: NDArray[np.int32]) -> None:
        """Every page is free or in this list of what owners have, once."""
        assert np.array_equal(np.sort(owned), np.flatnonzero(~self._is_free)), (
            f"{owned.size} pages of the arena have an owner, {(~self._is_free).sum()} are taken"
        )

    def _wait(self) -> None:
        if self._pool.k.device.type != "cpu":
            torch.cuda.synchronize(self._pool.k.device)


def _pieces(host: NDArray[np.int32], tensor: Tensor) -> Iterator[tuple[slice, slice]]:
    """Runs of consecutive pages, none too large to be copied at once: (pages, places in `host`)."""
    if not host.size:
        return
    most = max(1, PIECE_BYTES // (tensor[0].numel() * tensor.itemsize))
    ends = [*np.flatnonzero(np.diff(host) != 1) + 1, host.size]
    start = 0
    for end in ends:
        for first in range(start, end, most):
            last = min(first + most, end)
            yield slice(int(host[first]), int(host[last - 1]) + 1), slice(first, last)
        start = end


def _like(tensor: Tensor, num_pages: int) -> Tensor:
    """Memory for so many pages; on a CPU it is taken only where something is written."""
    shape = (num_pages, *tensor.shape[1:])
    if tensor.device.type != "cpu":
        return torch.empty(shape, dtype=tensor.dtype, pin_memory=True)
    memory = torch.from_numpy(np.zeros(math.prod(shape) * tensor.itemsize, dtype=np.uint8))
    return memory.view(tensor.dtype).view(shape)

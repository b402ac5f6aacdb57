"""PagePool: the memory of all keys and values, in pages of 64 tokens of one row, and who refers to them."""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.model import PAGE_SIZE
from configs.quantised import dequantise, is_quantised, token_bytes
from kvcache.state import StateRegistry

ALIGNMENT = 64  # bytes: a cache line, and the widest vector a kernel loads


class OutOfPages(RuntimeError):
    """More pages were taken than admission promised: our mistake, never the user's."""


def pages_for(tokens: int) -> int:
    """Pages of one row that hold so many tokens."""
    return -(-tokens // PAGE_SIZE)


def page_bytes(head_dim: int, dtype: torch.dtype, states: StateRegistry) -> int:
    """What one page of this dtype costs: keys, values, their scales, and the state that plug-ins declared."""
    return 2 * PAGE_SIZE * token_bytes(head_dim, dtype) + states.page_bytes


class PagePool:
    """`num_pages` pages, handed out by id. A page is free when nobody refers to it."""

    k: Tensor  # [num_pages + 1, PAGE_SIZE, D], the scratch page last
    v: Tensor  # [num_pages + 1, PAGE_SIZE, D]
    k_scales: Tensor | None  # [num_pages + 1, PAGE_SIZE] float32, by token; None where pages hold no codes
    v_scales: Tensor | None
    references: NDArray[np.int32]  # [num_pages]
    page_bytes: int
    make_room: Callable[[int], None]  # asked for so many pages when too few are free

    def __init__(
        self,
        num_pages: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        states: StateRegistry,
    ) -> None:
        if num_pages < 1:
            raise ValueError(f"the cache has {num_pages} pages; it needs at least 1: give it more memory")
        shape = (num_pages + 1, PAGE_SIZE, head_dim)
        # Zeros, not garbage: masked attention multiplies unwritten values by 0, and 0 * NaN is NaN.
        self.k = _zeros(shape, dtype, device)
        self.v = _zeros(shape, dtype, device)
        self.k_scales = _zeros(shape[:2], torch.float32, device) if is_quantised(dtype) else None
        self.v_scales = _zeros(shape[:2], torch.float32, device) if is_quantised(dtype) else None
        self._states = states
        self.references = np.zeros(num_pages, dtype=np.int32)
        self.page_bytes = page_bytes(head_dim, dtype, states)
        self._free = np.arange(num_pages, dtype=np.int32)[::-1].copy()  # a stack: [0, num_free) are free
        self._num_free = num_pages
        self.make_room = lambda count: None

    @property
    def num_pages(self) -> int:
        return len(self.references)

    @property
    def scratch_page(self) -> int:
        """A page that is never handed out: what belongs to nobody may be written there."""
        return self.num_pages

    @property
    def by_token(self) -> list[Tensor]:
        """What each token of a page carries, to be moved: [num_pages, PAGE_SIZE, ...]; codes as bytes."""
        if self.k_scales is None or self.v_scales is None:
            return [self.k, self.v]
        return [self.k.view(torch.int8), self.v.view(torch.int8), self.k_scales, self.v_scales]

    @property
    def carried(self) -> list[Tensor]:
        """Everything that a page carries, and so what its copy is: [num_pages, ...] each."""
        return [*self.by_token, *self._states.all_pages()]

    @property
    def num_free(self) -> int:
        return self._num_free

    def keys(self, pages: Tensor, dtype: torch.dtype) -> Tensor:
        """The keys of these pages [n], as attention reads them: [n, PAGE_SIZE, D]."""
        keys = self.k.index_select(0, pages)
        if self.k_scales is None:
            return keys
        return dequantise(keys, self.k_scales.index_select(0, pages), dtype)

    def allocate(self, count: int) -> NDArray[np.int32]:
        """`count` free pages, each referred to once. Contents are whatever was there."""
        if count > self._num_free:
            self.make_room(count - self._num_free)
        if count > self._num_free:
            raise OutOfPages(f"{count} pages wanted, {self._num_free} of {self.num_pages} are free")
        pages = self._free[self._num_free - count : self._num_free][::-1].copy()
        self._num_free -= count
        self.references[pages] = 1
        return pages

    def retain(self, pages: NDArray[np.int32]) -> None:
        """One more reference to each page. -1 is ignored; an id stands at most once in `pages`."""
        pages = pages[pages >= 0]
        assert (self.references[pages] > 0).all(), f"retained free pages {pages[self.references[pages] <= 0]}"
        self.references[pages] += 1

    def release(self, pages: NDArray[np.int32]) -> None:
        """One reference less to each page, free at 0. -1 is ignored; an id stands at most once in `pages`."""
        pages = pages[pages >= 0]
        assert (self.references[pages] > 0).all(), f"released free pages {pages[self.references[pages] <= 0]}"
        self.references[pages] -= 1
        freed = pages[self.references[pages] == 0]
        self._free[self._num_free : self._num_free + freed.size] = freed[::-1]
        self._num_free += freed.size

    def check(self) -> None:
        """The free stack holds exactly the pages that nobody refers to, each once."""
        free = np.sort(self._free[: self._num_free])
        unreferenced = np.flatnonzero(self.references == 0)
        assert np.array_equal(free, unreferenced), (
            f"{free.size} pages on the free stack, {unreferenced.size} without a reference; differing: "
            f"{np.setxor1d(free, unreferenced)[:8]}"
        )
        assert (self.references >= 0).all(), f"negative counts at {np.flatnonzero(self.references < 0)[:8]}"


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU they take memory only where something is written, so a large pool starts at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = torch.from_numpy(np.zeros(size + ALIGNMENT, dtype=np.uint8))  # from calloc: torch's zeros write
    first = -memory.data_ptr() % ALIGNMENT
    return memory[first : first + size].view(dtype).view(shape)

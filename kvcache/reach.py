"""Reach: how long each page is read, which says both what a mask hides and when a page may leave."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.model import PAGE_SIZE, ModelInfo
from kvcache.pool import pages_for

FOREVER = np.iinfo(np.int32).max  # every later query reads the page


@dataclass(frozen=True, eq=False)
class Reach:
    """Of one sequence: page j is read by the queries of so many pages, its own first, and by none after them.

        reach 3:    page j      | j + 1 | j + 2 | j + 3 ...
                    is written  | reads | reads | reads it no more: it has left

    What is not read once is never read again, so a page that leaves changes no answer.
    """

    pages: Tensor  # [L, Hkv, P] int32, at least 1; P pages of prompt and answer
    masks: tuple[bool, ...]  # [L] must attention be told? Not where nothing ends, nor where the model knows

    @classmethod
    def of(cls, pages: NDArray[np.int32], model: ModelInfo) -> "Reach | None":
        """From a policy's [L, Hkv, P], or None if every page is always read. Layers whose model has a window
        of its own keep to that, whatever the policy says."""
        own = [model.window(layer) is not None for layer in range(model.num_layers)]
        pages = np.ascontiguousarray(pages, dtype=np.int32)
        for layer in np.flatnonzero(own):
            pages[layer] = pages_of_window(model.window(int(layer)) or 1)
        ends = (pages < pages.shape[-1] - np.arange(pages.shape[-1])).any((1, 2))
        if not ends.any():
            return None
        masks = tuple(bool(end) and not known for end, known in zip(ends, own, strict=True))
        return cls(torch.from_numpy(pages), masks)

    def to(self, device: torch.device) -> "Reach":
        """The same, to mask with; what leaves is asked of the one on the host."""
        return self if self.pages.device == device else Reach(self.pages.to(device), self.masks)

    def read_by(self, layer: int, start: int, length: int) -> Tensor:
        """Pages that the queries at [start, start + length) read: bool [Hkv, B, P], B pages of queries."""
        first, last = start // PAGE_SIZE, pages_for(start + length)
        position = torch.arange(last, device=self.pages.device)
        distance = position[first:, None] - position  # [B, P]
        return (distance >= 0) & (distance < self.pages[layer, :, None, :last])

    def left(self, page: int) -> NDArray[np.bool_]:
        """Pages before this one that its queries, and all later ones, do not read: bool [L, Hkv, page]."""
        gone: NDArray[np.bool_] = page - np.arange(page) >= self.pages[..., :page].numpy()
        return gone

    def pages_needed(self, prompt: int, total: int, chunk: int) -> int:
        """The most pages of all rows that are held at once (lengths in tokens, no forward above `chunk`).

        Pages leave between chunks, so a chunk is held beside what stayed before it.
        """
        start = np.arange(pages_for(prompt))  # page that a chunk begins with
        end = -(-np.minimum(prompt, start * PAGE_SIZE + chunk) // PAGE_SIZE)
        peak = int((self._held[start] + self._num_rows * (end - start)).max())
        return max(peak, self.pages_after_prefill(prompt, total))

    def pages_after_prefill(self, prompt: int, total: int) -> int:
        """The most pages of all rows that are held while answering."""
        first = prompt // PAGE_SIZE
        last = max(first, (total - 1) // PAGE_SIZE)
        writing = self._num_rows  # a page of every row
        most = int(self._held[first : last + 1].max()) + writing
        return min(most, self._num_rows * pages_for(total))

    @property
    def _num_rows(self) -> int:
        """L * Hkv."""
        return self.pages.shape[0] * self.pages.shape[1]

    @cached_property
    def _held(self) -> NDArray[np.int64]:
        """Pages of all rows before page n that its queries read, for every n: [P + 1]."""
        reach = self.pages.numpy()
        num_pages = reach.shape[-1]
        page = np.arange(num_pages)
        leaves = np.minimum(page + reach.astype(np.int64), num_pages + 1)  # page whose queries find it gone
        gone = np.bincount(leaves.ravel(), minlength=num_pages + 2)[: num_pages + 1].cumsum()
        held: NDArray[np.int64] = self._num_rows * np.arange(num_pages + 1) - gone
        return held


def pages_of_window(window: int) -> int:
    """Pages of queries that may read some key of a page, if each reads the `window` keys up to its own."""
    return pages_for(window - 1) + 1


def reach_of_windows(model: ModelInfo, total_length: int) -> Reach | None:
    """What the windows of the model itself leave unread; None if it has none, or none that slides."""
    rows = (model.num_layers, model.num_kv_heads, pages_for(total_length))
    return Reach.of(np.full(rows, FOREVER, dtype=np.int32), model)

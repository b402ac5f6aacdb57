"""KeyView: the keys and values that one sequence holds in one layer, borrowed for one call."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from configs.model import PAGE_SIZE
from configs.quantised import dequantise
from kvcache.origins import Origins


@dataclass(slots=True, eq=False)
class KeyView:
    """Indexed by logical block until the sequence is packed, then by place. Never written through."""

    k_pool: Tensor  # [num_pages, PAGE_SIZE, D], shared by every row of the server
    v_pool: Tensor  # [num_pages, PAGE_SIZE, D]
    dtype: torch.dtype  # of keys and values once read
    pages: Tensor  # [Hkv, P] int32, -1 = dropped
    num_tokens: int  # logical length N: the positions [0, N) have been computed (this chunk included)
    num_held: Tensor  # [Hkv] int32 tokens held, this chunk included
    max_held: int  # the largest of them, known on the host
    layer: int
    has_holes: bool  # known on the host: some page of this layer was dropped and the row is not packed
    origins: Origins | None = None  # set once the sequence is packed
    k_scales: Tensor | None = None  # [num_pages, PAGE_SIZE] float32, where the pools hold codes
    v_scales: Tensor | None = None
    _gathered: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    @property
    def positions(self) -> Tensor:
        """[Hkv, max_held] int32: original positions of the held tokens, ascending, -1 pad."""
        if self.origins is not None:
            return self.origins.positions(self.layer, self.num_held, self.max_held)
        num_heads, device = self.pages.shape[0], self.pages.device
        position = torch.arange(self.num_tokens, dtype=torch.int32, device=device).expand(num_heads, -1)
        if not self.has_holes:
            return position.clone()
        held = self.pages[:, (position[0] // PAGE_SIZE).long()] >= 0
        order = (~held).int().argsort(dim=1, stable=True)[:, : self.max_held]  # held first, ascending
        place = torch.arange(self.max_held, device=device)
        return order.int().masked_fill(place >= self.num_held[:, None], -1)

    def contiguous(self) -> tuple[Tensor, Tensor]:
        """Keys and values, gathered once: [Hkv, N, D] by position, dropped pages are zeros.

        Of a packed sequence [Hkv, max_held, D] in the order of `positions`; padding is zeros.
        Whole pages are copied, so the rows may be a slice of a slightly longer tensor.
        """
        if self._gathered is None:
            self._gathered = (
                self._gather(self.k_pool, self.k_scales),
                self._gather(self.v_pool, self.v_scales),
            )
        return self._gathered

    def _gather(self, pool: Tensor, scales: Tensor | None) -> Tensor:
        num_heads, num_pages = self.pages.shape
        length = self.num_tokens if self.origins is None else self.max_held
        ids = self.pages.flatten().clamp(min=0)
        rows = pool.index_select(0, ids)
        if scales is not None:
            rows = dequantise(rows, scales.index_select(0, ids), self.dtype)
        rows = rows.view(num_heads, num_pages * PAGE_SIZE, pool.shape[2])[:, :length]
        if self.origins is not None:
            place = torch.arange(length, device=pool.device)
            rows.masked_fill_((place >= self.num_held[:, None]).unsqueeze(-1), 0)
        elif self.has_holes:
            dropped = (self.pages < 0).repeat_interleave(PAGE_SIZE, dim=1)[:, :length]
            rows.masked_fill_(dropped.unsqueeze(-1), 0)
        return rows

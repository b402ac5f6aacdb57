"""Random prompts of one layer: queries, keys in shuffled pages, and selections of a wanted density."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.model import PAGE_SIZE
from sparse.selection import ALL, Selection, lists_from_mask


@dataclass
class PagedKeys:
    """A KeyView over shuffled pages of its own."""

    num_tokens: int
    k_pool: Tensor
    v_pool: Tensor
    pages: Tensor
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None
    has_holes: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.k_pool.dtype

    def contiguous(self) -> tuple[Tensor, Tensor]:
        ids = self.pages.long()
        return self.k_pool[ids].flatten(1, 2), self.v_pool[ids].flatten(1, 2)


@dataclass(frozen=True)
class RandomPrompt:
    """Queries, their paged keys, and the same keys in one piece for torch."""

    q: Tensor  # [Hq, N, D]
    keys: PagedKeys
    k: Tensor  # [Hkv, N, D]
    v: Tensor


@dataclass(frozen=True)
class Shape:
    """What is drawn, and where. `length` is whole query blocks."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    length: int
    dtype: torch.dtype
    device: torch.device


def draw_prompt(shape: Shape, seed: int) -> RandomPrompt:
    g = torch.Generator(shape.device).manual_seed(seed)
    num_pages = shape.num_kv_heads * shape.length // PAGE_SIZE

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=g, device=shape.device).to(shape.dtype)

    k_pool, v_pool = (normal(num_pages, PAGE_SIZE, shape.head_dim) for _ in range(2))
    order = torch.randperm(num_pages, generator=g, device=shape.device).int()
    keys = PagedKeys(shape.length, k_pool, v_pool, order.view(shape.num_kv_heads, -1))
    return RandomPrompt(normal(shape.num_heads, shape.length, shape.head_dim), keys, *keys.contiguous())


def draw_selection(
    length: int, densities: Sequence[float], query_block: int, device: torch.device, seed: int = 0
) -> Selection:
    """One list per density: first page, diagonal, and others at random until it is reached; 1 = ALL."""
    g = torch.Generator(device).manual_seed(seed)
    num_blocks, num_pages = length // query_block, length // PAGE_SIZE
    per_block = query_block // PAGE_SIZE
    block = torch.arange(num_blocks, device=device)[:, None]
    page = torch.arange(num_pages, device=device)
    past = page < block * per_block
    own = page // per_block == block
    forced = own | (page == 0)
    masks = []
    for density in densities:
        # What is forced is part of the density: the rest is drawn that much thinner.
        wanted = density * (past | own).sum(1) - forced.sum(1)
        share = (wanted / past.sum(1).clamp_min(1)).clamp_min(0)[:, None]
        drawn = torch.rand(num_blocks, num_pages, generator=g, device=device) < share
        masks.append(forced | (drawn & past))
    selection = Selection(query_block, lists_from_mask(torch.stack(masks), PAGE_SIZE))
    for head, density in enumerate(densities):
        if density == 1:
            selection.pages.counts[head] = ALL
    return selection

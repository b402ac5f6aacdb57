"""Pages, chunks and selections for tests: tokens scattered over the shuffled pages of a poisoned pool."""

from dataclasses import dataclass

import torch
from torch import Tensor

from configs.model import PAGE_SIZE, ModelInfo
from configs.quantised import dequantise, quantise
from sparse.base import Chunk
from sparse.selection import ALL, Selection, lists_from_mask, num_query_blocks
from tests.reference import causal


@dataclass
class PagedKeys:
    """A KeyView over tensors of its own."""

    num_tokens: int
    k_pool: Tensor
    v_pool: Tensor
    pages: Tensor
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.k_pool.dtype if self.k_scales is None else torch.float32

    @property
    def has_holes(self) -> bool:
        return bool((self.pages[:, : -(-self.num_tokens // PAGE_SIZE)] < 0).any())

    def contiguous(self) -> tuple[Tensor, Tensor]:
        ids = self.pages[:, : -(-self.num_tokens // PAGE_SIZE)].long()
        dropped = (ids < 0)[..., None, None]
        k, v = (
            pool[ids.clamp_min(0)].masked_fill(dropped, 0).flatten(1, 2)[:, : self.num_tokens]
            for pool in self._meanings()
        )
        return k, v

    def quantised(self, dtype: torch.dtype) -> "PagedKeys":
        """The same pages as codes; the scales of what is not filled are NaN."""
        (k, k_scales), (v, v_scales) = quantise(self.k_pool, dtype), quantise(self.v_pool, dtype)
        return PagedKeys(self.num_tokens, k, v, self.pages, k_scales, v_scales)

    def _meanings(self) -> tuple[Tensor, Tensor]:
        if self.k_scales is None or self.v_scales is None:
            return self.k_pool, self.v_pool
        return dequantise(self.k_pool, self.k_scales, self.dtype), dequantise(
            self.v_pool, self.v_scales, self.dtype
        )


def make_keys(k: Tensor, v: Tensor, seed: int = 0) -> PagedKeys:
    """k, v [Hkv, N, D] in shuffled pages; what they do not fill is NaN, and the table has room to spare."""
    num_heads, num_tokens, head_dim = k.shape
    num_blocks = -(-num_tokens // PAGE_SIZE)
    num_pages = num_heads * num_blocks + 3
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed))
    ids = order[: num_heads * num_blocks].view(num_heads, num_blocks)
    pools = []
    for x in (k, v):
        pool = torch.full((num_pages, PAGE_SIZE, head_dim), float("nan"), dtype=x.dtype)
        padded = x.new_full((num_heads, num_blocks * PAGE_SIZE, head_dim), float("nan"))
        padded[:, :num_tokens] = x
        pool[ids] = padded.view(num_heads, num_blocks, PAGE_SIZE, head_dim)
        pools.append(pool)
    table = torch.full((num_heads, num_blocks + 2), -1, dtype=torch.int32)
    table[:, :num_blocks] = ids
    return PagedKeys(num_tokens, pools[0], pools[1], table)


def make_chunk(start: int, length: int) -> Chunk:
    """A chunk that ends its prompt."""
    return Chunk(start, length, prompt_length=start + length, total_length=start + length + 1, slot=0)


def make_model(num_layers: int = 2, num_query_heads: int = 4, num_kv_heads: int = 2) -> ModelInfo:
    return ModelInfo("tiny", num_layers, num_query_heads, num_kv_heads, 16, 100, 4096)


def make_qkv(
    start: int, length: int, num_heads: int, num_kv_heads: int, head_dim: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q [Hq, length, D] of the last rows, k and v [Hkv, start + length, D]; fp32."""
    g = torch.Generator().manual_seed(seed)
    num_tokens = start + length
    return (
        2 * torch.randn(num_heads, length, head_dim, generator=g),
        torch.randn(num_kv_heads, num_tokens, head_dim, generator=g),
        torch.randn(num_kv_heads, num_tokens, head_dim, generator=g),
    )


def random_selection(
    chunk: Chunk,
    num_lists: int,
    query_block: int = 64,
    unit: int | None = None,
    density: float = 0.4,
    seed: int = 0,
) -> Selection:
    """Lists drawn at random, among them an empty one and one that is ALL, when there are more than two."""
    g = torch.Generator().manual_seed(seed)
    num_blocks = num_query_blocks(chunk.start, chunk.length, query_block)
    first_block = chunk.start // query_block
    num_pages = -(-(chunk.start + chunk.length) // PAGE_SIZE)
    pages = torch.rand(num_lists, num_blocks, num_pages, generator=g) < density
    for b in range(num_blocks):
        pages[:, b, ((first_block + b + 1) * query_block) // PAGE_SIZE :] = False
    gathered = None
    if unit is not None:
        num_units = num_pages * PAGE_SIZE // unit
        units = torch.rand(num_lists, num_blocks, num_units, generator=g) < density
        units &= ~pages.repeat_interleave(PAGE_SIZE // unit, dim=-1)
        for b in range(num_blocks):
            first_row = max(chunk.start, (first_block + b) * query_block)
            units[:, b, first_row // PAGE_SIZE * PAGE_SIZE // unit :] = False
        gathered = lists_from_mask(units, unit)
    selection = Selection(query_block, lists_from_mask(pages, PAGE_SIZE), gathered)
    if num_lists * num_blocks > 2:
        counts = selection.pages.counts.flatten()
        counts[0], counts[-1] = 0, ALL
    return selection


def selected_mask(selection: Selection, chunk: Chunk) -> Tensor:
    """What a selection reads, one list entry at a time: bool [H, Tq, N], causal."""
    num_tokens = chunk.start + chunk.length
    mask = torch.zeros(selection.pages.num_heads, chunk.length, num_tokens, dtype=torch.bool)
    first_block = chunk.start // selection.query_block
    for head in range(selection.pages.num_heads):
        for block in range(selection.pages.counts.shape[1]):
            end = (first_block + block + 1) * selection.query_block - chunk.start
            rows = mask[head, max(0, end - selection.query_block) : end]
            if selection.pages.counts[head, block] == ALL:
                rows[:] = True
                continue
            for lists in (selection.pages, selection.gathered):
                if lists is None:
                    continue
                start, count = int(lists.starts[head, block]), int(lists.counts[head, block])
                for i in lists.indices[start : start + count].tolist():
                    rows[:, i * lists.unit : (i + 1) * lists.unit] = True
    return mask & causal(chunk.start, chunk.length)

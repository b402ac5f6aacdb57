"""Compaction of one layer on a GPU: its rows keep some of their tokens, packed in order in new pages.

New pages may be old ones of the same row, so kept tokens go through a buffer: out of all old pages, then in.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from configs.model import PAGE_SIZE
from kvcache.pool import PagePool

# ----------------------------------------------------------------------
# the kernels
# ----------------------------------------------------------------------


@triton.jit
def _copy_tokens(source, target, source_offset, target_offset, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tokens [N] at these element offsets, where mask [N]."""
    offset_d = tl.arange(0, BLOCK_D)
    inside = mask[:, None] & (offset_d < D)[None, :]
    tile = tl.load(source + source_offset[:, None] + offset_d[None, :], mask=inside)
    tl.store(target + target_offset[:, None] + offset_d[None, :], tile, mask=inside)


@triton.jit
def _copy_scales(source, target, source_offset, target_offset, mask):
    """The scales of tokens [N], if pages hold codes."""
    if source is not None:
        tl.store(target + target_offset, tl.load(source + source_offset, mask=mask), mask=mask)


@triton.jit(
    do_not_specialize=["num_tokens", "width", "num_blocks", "stride_keep", "stride_old", "stride_ids"],
    do_not_specialize_on_alignment=["keep", "old", "ids"],  # of any layer: they begin anywhere
)
def _gather_kernel(
    k_pool,  # [num_pages, PAGE, D]
    v_pool,  # [num_pages, PAGE, D]
    k_scales,  # [num_pages, PAGE] fp32, of codes (None without)
    v_scales,
    keep,  # [Hkv, N] bool
    ranks,  # [Hkv, num_blocks] int32: tokens kept up to the end of each block
    old,  # [Hkv, P] int32 page ids by block
    k_kept,  # [Hkv, width, D]
    v_kept,  # [Hkv, width, D]
    k_scales_kept,  # [Hkv, width] fp32 (None without)
    v_scales_kept,
    ids,  # [Hkv, width] int32: positions of the kept tokens
    num_tokens,  # N
    width,
    num_blocks,
    stride_keep,
    stride_old,
    stride_ids,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = (tl.program_id(0) // num_blocks).to(tl.int64)
    block = tl.program_id(0) % num_blocks
    offset = tl.arange(0, PAGE)
    position = block * PAGE + offset
    is_kept = tl.load(keep + head * stride_keep + position, mask=position < num_tokens, other=0).to(tl.int32)
    count = tl.sum(is_kept, 0)
    if count == 0:
        return
    first = tl.load(ranks + head * num_blocks + block) - count
    place = first + tl.cumsum(is_kept, 0) - 1
    mask = is_kept > 0
    page = tl.load(old + head * stride_old + block).to(tl.int64)
    source = page * PAGE + offset
    target = head * width + place
    _copy_tokens(k_pool, k_kept, source * D, target * D, mask, D, BLOCK_D)
    _copy_tokens(v_pool, v_kept, source * D, target * D, mask, D, BLOCK_D)
    _copy_scales(k_scales, k_scales_kept, source, target, mask)
    _copy_scales(v_scales, v_scales_kept, source, target, mask)
    tl.store(ids + head * stride_ids + place, position, mask=mask)


@triton.jit(
    do_not_specialize=["width", "num_places", "stride_new"],
    do_not_specialize_on_alignment=["counts", "new"],
)
def _scatter_kernel(
    k_pool,  # [num_pages, PAGE, D]
    v_pool,  # [num_pages, PAGE, D]
    k_scales,  # [num_pages, PAGE] fp32, of codes (None without)
    v_scales,
    counts,  # [Hkv] int32 tokens kept
    new,  # [Hkv, P] int32 page ids by place
    k_kept,  # [Hkv, width, D]
    v_kept,  # [Hkv, width, D]
    k_scales_kept,  # [Hkv, width] fp32 (None without)
    v_scales_kept,
    width,
    num_places,  # pages that the longest row fills
    stride_new,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = (tl.program_id(0) // num_places).to(tl.int64)
    place = tl.program_id(0) % num_places
    offset = tl.arange(0, PAGE)
    token = place * PAGE + offset
    count = tl.load(counts + head)
    if place * PAGE >= count:
        return
    page = tl.load(new + head * stride_new + place).to(tl.int64)
    source = head * width + token
    target = page * PAGE + offset
    _copy_tokens(k_kept, k_pool, source * D, target * D, token < count, D, BLOCK_D)
    _copy_tokens(v_kept, v_pool, source * D, target * D, token < count, D, BLOCK_D)
    _copy_scales(k_scales_kept, k_scales, source, target, token < count)
    _copy_scales(v_scales_kept, v_scales, source, target, token < count)


# ----------------------------------------------------------------------
# the launcher
# ----------------------------------------------------------------------

OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def constants(head_dim: int) -> dict[str, int | float | bool]:
    """The CAPITALS of both kernels."""
    return {"PAGE": PAGE_SIZE, "D": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim))}


def move_kept(pool: PagePool, keep: Tensor, counts: Tensor, old: Tensor, new: Tensor, ids: Tensor) -> None:
    """What kvcache.compaction.move_kept does, without waiting for the device.

    keep [Hkv, N] bool, counts int32 [Hkv] its sums, old int32 [Hkv, P] by block, new int32 [Hkv, P] by place;
    ids int32 [Hkv, K], none of counts over K, receives the positions of the kept tokens.
    """
    k_pool, v_pool = pool.by_token[:2]  # codes as bytes
    num_heads, num_tokens = keep.shape
    width, head_dim = ids.shape[1], k_pool.shape[2]
    assert k_pool.is_contiguous() and v_pool.is_contiguous() and k_pool.shape == v_pool.shape
    assert keep.dtype == torch.bool and counts.dtype == old.dtype == new.dtype == ids.dtype == torch.int32
    assert counts.shape == (num_heads,) and old.shape[0] == new.shape[0] == ids.shape[0] == num_heads
    assert all(x.stride(-1) == 1 for x in (keep, counts, old, new, ids))
    if width == 0:
        return
    num_blocks, num_places = triton.cdiv(num_tokens, PAGE_SIZE), triton.cdiv(width, PAGE_SIZE)
    assert old.shape[1] >= num_blocks and new.shape[1] >= num_places, (
        old.shape,
        new.shape,
        keep.shape,
        width,
    )
    padded = torch.nn.functional.pad(keep, (0, num_blocks * PAGE_SIZE - num_tokens))
    kept_in_block = padded.view(num_heads, num_blocks, PAGE_SIZE).sum(-1, dtype=torch.int32)
    ranks = kept_in_block.cumsum(-1, dtype=torch.int32)
    k_kept, v_kept = (x.new_empty(num_heads, width, head_dim) for x in (k_pool, v_pool))
    scales = (pool.k_scales, pool.v_scales)
    scales_kept = [None if x is None else x.new_empty(num_heads, width) for x in scales]
    capitals = constants(head_dim)
    _gather_kernel[(num_heads * num_blocks,)](
        k_pool,
        v_pool,
        *scales,
        keep,
        ranks,
        old,
        k_kept,
        v_kept,
        *scales_kept,
        ids,
        num_tokens,
        width,
        num_blocks,
        keep.stride(0),
        old.stride(0),
        ids.stride(0),
        **capitals,
        **OPTIONS,
    )
    _scatter_kernel[(num_heads * num_places,)](
        k_pool,
        v_pool,
        *scales,
        counts,
        new,
        k_kept,
        v_kept,
        *scales_kept,
        width,
        num_places,
        new.stride(0),
        **capitals,
        **OPTIONS,
    )

"""Largest, smallest and mean key of each page before RoPE on a GPU: what SeerAttention's gates see."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from configs.model import PAGE_SIZE
from configs.rotation import Rotation
from sparse.base import KeyView

# ----------------------------------------------------------------------
# the kernel
# ----------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["num_tokens", "num_pages", "num_heads", "first", "stride_pages"],
    do_not_specialize_on_alignment=["pages"],
)
def _pool_kernel(
    k_pool,  # [num_pages of the pool, PAGE, D]
    k_scales,  # [num_pages of the pool, PAGE] fp32, of codes (None without)
    pages,  # [Hkv, P] int32, -1 = dropped
    cos,  # [tokens from the first page on, HALF] fp32, that take RoPE back (None where nothing is rotated)
    sin,
    pooled,  # [Hkv, num_pages, 3, D] fp32 out: largest, smallest, mean; zeros of dropped pages
    num_tokens,
    num_pages,  # with these tokens
    num_heads,  # Hkv
    first,  # page that the first programs take
    stride_pages,
    D: tl.constexpr,
    HALF: tl.constexpr,  # half of the dimensions that are rotated
    INTERLEAVED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,  # keys at once
    PAGE: tl.constexpr,
):
    # programs of one page stand side by side: its cos and sin are read once
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    i = tl.program_id(0) // num_heads
    block = first + i
    page = tl.load(pages + head * stride_pages + block)
    # beyond the last token the page is unwritten memory
    length = tl.where(page >= 0, tl.minimum(num_tokens - block * PAGE, PAGE), 0)
    offset_d = tl.arange(0, BLOCK_D)
    inside_d = (offset_d < D)[None, :]
    is_rotated = (offset_d < 2 * HALF)[None, :]
    if INTERLEAVED:
        is_first, pair, partner = offset_d % 2 == 0, offset_d // 2, offset_d ^ 1
    else:
        is_first, pair = offset_d < HALF, offset_d % HALF
        partner = tl.where(is_first, offset_d + HALF, offset_d - HALF)

    largest = tl.full([BLOCK_D], float("-inf"), tl.float32)
    smallest = tl.full([BLOCK_D], float("inf"), tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for n in tl.range(0, length, BLOCK_N):
        offset_n = n + tl.arange(0, BLOCK_N)
        present = (offset_n < length)[:, None]
        tokens = k_pool + page.to(tl.int64) * (PAGE * D) + offset_n[:, None] * D
        keys = tl.load(tokens + offset_d[None, :], mask=present & inside_d, other=0.0).to(tl.float32)
        if cos is not None:
            turns = present & is_rotated
            others = tl.load(tokens + partner[None, :], mask=turns, other=0.0).to(tl.float32)
            angle = (i * PAGE + offset_n)[:, None] * HALF + pair[None, :]
            sines = tl.load(sin + angle, mask=turns, other=0.0)
            keys *= tl.load(cos + angle, mask=turns, other=1.0)
            keys += others * tl.where(is_first[None, :], -sines, sines)
        if k_scales is not None:
            scales = tl.load(
                k_scales + page.to(tl.int64) * PAGE + offset_n, mask=offset_n < length, other=0.0
            )
            keys *= scales[:, None]
        largest = tl.maximum(largest, tl.max(tl.where(present, keys, float("-inf")), 0))
        smallest = tl.minimum(smallest, tl.min(tl.where(present, keys, float("inf")), 0))
        total += tl.sum(keys, 0)
    target = pooled + (head * num_pages + block) * (3 * D) + offset_d
    tl.store(target, tl.where(length > 0, largest, 0.0), mask=offset_d < D)
    tl.store(target + D, tl.where(length > 0, smallest, 0.0), mask=offset_d < D)
    tl.store(target + 2 * D, total / tl.maximum(length, 1), mask=offset_d < D)


# ----------------------------------------------------------------------
# the launcher
# ----------------------------------------------------------------------

BLOCK_N = 16
ANGLES = 1 << 23  # cosines of one launch: 32 MiB, whatever the prompt's length
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def constants(*, head_dim: int, half: int, interleaved: bool) -> dict[str, int | bool]:
    """The kernel's CAPITALS. half: of the dimensions that are rotated, 1 where none are."""
    return {
        "D": head_dim,
        "HALF": half,
        "INTERLEAVED": interleaved,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_N": BLOCK_N,
        "PAGE": PAGE_SIZE,
    }


def pool_pages(keys: KeyView, num_tokens: int, rotation: Rotation | None) -> Tensor:
    """What sparse.page_scores.pool_pages gives, without a copy of the pages; a launch for many of them."""
    k_pool, device = keys.k_pool, keys.k_pool.device
    assert k_pool.is_contiguous() and keys.pages.dtype == torch.int32 and keys.pages.stride(1) == 1
    num_heads, num_pages, head_dim = keys.pages.shape[0], triton.cdiv(num_tokens, PAGE_SIZE), k_pool.shape[2]
    pooled = torch.empty(num_heads, num_pages, 3 * head_dim, dtype=torch.float32, device=device)
    step = max(1, ANGLES // (PAGE_SIZE * head_dim // 2)) if rotation is not None else num_pages
    for first in range(0, num_pages, step):
        end = min(first + step, num_pages)
        cos, sin, half = None, None, 1
        if rotation is not None:
            positions = torch.arange(first * PAGE_SIZE, end * PAGE_SIZE, device=device)
            cos, sin = rotation.undoing(positions)
            half = cos.shape[1]
        _pool_kernel[(num_heads * (end - first),)](
            k_pool,
            keys.k_scales,
            keys.pages,
            cos,
            sin,
            pooled,
            num_tokens,
            num_pages,
            num_heads,
            first,
            keys.pages.stride(0),
            **constants(
                head_dim=head_dim, half=half, interleaved=rotation is not None and rotation.interleaved
            ),
            **OPTIONS,
        )
    return pooled

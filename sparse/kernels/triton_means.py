"""Means of the keys or values of each page on a GPU, read where they are."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from configs.model import PAGE_SIZE
from configs.triton_softmax import read_page, read_scales
from sparse.base import KeyView

# ----------------------------------------------------------------------
# the kernel
# ----------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["num_tokens", "num_pages", "stride_pages"], do_not_specialize_on_alignment=["pages"]
)
def _means_kernel(
    pool,  # [num_pages of the pool, PAGE, D]
    scales,  # [num_pages of the pool, PAGE] fp32, of codes (None without)
    pages,  # [Hkv, P] int32, -1 = dropped
    means,  # [Hkv, num_pages, D] fp32 out; zeros of dropped pages
    num_tokens,
    num_pages,  # with these tokens
    stride_pages,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
):
    head = (tl.program_id(0) // num_pages).to(tl.int64)
    i = tl.program_id(0) % num_pages
    page = tl.load(pages + head * stride_pages + i)
    # beyond the last token the page is unwritten memory
    length = tl.where(page >= 0, tl.minimum(num_tokens - i * PAGE, PAGE), 0)
    tokens = read_page(pool, page, length, tl.zeros([1], tl.float32), D, BLOCK_D, PAGE)
    if scales is not None:
        tokens *= read_scales(scales, page, length, PAGE)[:, None]
    mean = tl.sum(tokens, 0) / tl.maximum(length, 1)
    offset_d = tl.arange(0, BLOCK_D)
    tl.store(means + (head * num_pages + i) * D + offset_d, mean, mask=offset_d < D)


# ----------------------------------------------------------------------
# the launcher
# ----------------------------------------------------------------------

OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def constants(head_dim: int) -> dict[str, int]:
    """The kernel's CAPITALS."""
    return {"D": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)), "PAGE": PAGE_SIZE}


def mean_pages(keys: KeyView, num_tokens: int, *, values: bool = False) -> Tensor:
    """What sparse.page_scores.mean_pages gives, in one launch and without a copy of the pages."""
    pool, scales = (keys.v_pool, keys.v_scales) if values else (keys.k_pool, keys.k_scales)
    assert pool.is_contiguous() and keys.pages.dtype == torch.int32 and keys.pages.stride(1) == 1
    num_heads, num_pages, head_dim = keys.pages.shape[0], triton.cdiv(num_tokens, PAGE_SIZE), pool.shape[2]
    means = torch.empty(num_heads, num_pages, head_dim, dtype=torch.float32, device=pool.device)
    _means_kernel[(num_heads * num_pages,)](
        pool,
        scales,
        keys.pages,
        means,
        num_tokens,
        num_pages,
        keys.pages.stride(0),
        **constants(head_dim),
        **OPTIONS,
    )
    return means

"""New keys and values into pages on a GPU: both in one launch, whatever strides a model left them with."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from configs.model import PAGE_SIZE
from configs.quantised import LARGEST, is_quantised
from kvcache.pool import PagePool

# ----------------------------------------------------------------------
# the kernel
# ----------------------------------------------------------------------

ROUND = tl.constexpr(1.5 * 2**23)  # what is added to it loses its fraction
TINY = tl.constexpr(2.0**-126)  # the least normal float: a token of zeros is divided by it


@triton.jit
def _quantise(tokens, like, LARGEST: tl.constexpr):
    """Codes of tokens [N, BLOCK_D] in the dtype of `like`, and their scales [N] fp32."""
    tokens = tokens.to(tl.float32)
    scales = tl.div_rn(tl.max(tl.abs(tokens), 1), LARGEST)
    codes = tl.div_rn(tokens, tl.maximum(scales, TINY)[:, None])
    if like.dtype.element_ty == tl.int8:
        codes = (codes + ROUND) - ROUND  # to the nearest whole number, ties to even
    return codes.to(like.dtype.element_ty), scales


@triton.jit(
    do_not_specialize=["num_tokens", "num_columns", "stride_destination_a"],
    do_not_specialize_on_alignment=["destinations"],
)
def _store_kernel(
    k_pool,  # [num_pages, PAGE, D]
    v_pool,  # [num_pages, PAGE, D]
    k_scales,  # [num_pages, PAGE] fp32, of codes (None without)
    v_scales,
    k,  # [A, C, D], any strides
    v,  # [A, C, D]
    destinations,  # [A, C] int64, page * PAGE + offset
    num_tokens,  # A * C
    num_columns,  # C
    stride_k_a,
    stride_k_c,
    stride_k_d,
    stride_v_a,
    stride_v_c,
    stride_v_d,
    stride_destination_a,
    stride_destination_c,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D rounded up to a power of two
    BLOCK_T: tl.constexpr,  # tokens per program
    LARGEST: tl.constexpr,  # code, 0 without
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offset_d = tl.arange(0, BLOCK_D)
    inside = token < num_tokens
    a = token // num_columns
    c = token % num_columns
    place = tl.load(destinations + a * stride_destination_a + c * stride_destination_c, mask=inside, other=0)
    mask = inside[:, None] & (offset_d < D)[None, :]
    target = place[:, None] * D + offset_d[None, :]
    k_offsets = (a * stride_k_a + c * stride_k_c)[:, None] + offset_d * stride_k_d
    v_offsets = (a * stride_v_a + c * stride_v_c)[:, None] + offset_d * stride_v_d
    keys = tl.load(k + k_offsets, mask=mask, other=0.0)
    values = tl.load(v + v_offsets, mask=mask, other=0.0)
    if LARGEST > 0:
        keys, key_scales = _quantise(keys, k_pool, LARGEST)
        values, value_scales = _quantise(values, v_pool, LARGEST)
        tl.store(k_scales + place, key_scales, mask=inside)
        tl.store(v_scales + place, value_scales, mask=inside)
    tl.store(k_pool + target, keys, mask=mask)
    tl.store(v_pool + target, values, mask=mask)


# ----------------------------------------------------------------------
# the launcher
# ----------------------------------------------------------------------

TILE_ELEMENTS = 2048  # of keys per program: eight 16-byte vectors for each of its threads
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def constants(head_dim: int, page_dtype: torch.dtype) -> dict[str, int | float | bool]:
    """The kernel's CAPITALS."""
    block = max(16, triton.next_power_of_2(head_dim))
    largest = LARGEST.get(page_dtype, 0.0)
    return {"D": head_dim, "BLOCK_D": block, "BLOCK_T": max(1, TILE_ELEMENTS // block), "LARGEST": largest}


def store(pool: PagePool, k: Tensor, v: Tensor, destinations: Tensor) -> None:
    """What kvcache.moves.store does. k, v [A, C, D] of any strides; destinations int64 [A, C]."""
    k_pool, v_pool = pool.k, pool.v
    assert k.shape == v.shape and k.shape[:2] == destinations.shape, (k.shape, v.shape, destinations.shape)
    assert k_pool.is_contiguous() and v_pool.is_contiguous() and k_pool.shape == v_pool.shape
    assert k_pool.shape[1:] == (PAGE_SIZE, k.shape[2]), (k_pool.shape, k.shape)
    assert k_pool.dtype == v_pool.dtype and k.dtype == v.dtype and destinations.dtype == torch.int64
    assert is_quantised(k_pool.dtype) or k_pool.dtype == k.dtype, (k_pool.dtype, k.dtype)
    if not destinations.numel():
        return
    capitals = constants(k.shape[2], k_pool.dtype)
    _store_kernel[(triton.cdiv(destinations.numel(), capitals["BLOCK_T"]),)](
        k_pool,
        v_pool,
        pool.k_scales,
        pool.v_scales,
        k,
        v,
        destinations,
        destinations.numel(),
        destinations.shape[1],
        *k.stride(),
        *v.stride(),
        *destinations.stride(),
        **capitals,
        **OPTIONS,
    )

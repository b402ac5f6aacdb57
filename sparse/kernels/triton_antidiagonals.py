"""Sums over antidiagonals of the scores on a GPU: how much each square of queries looks at each page."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from configs.model import PAGE_SIZE
from configs.quantised import is_quantised
from configs.triton_softmax import LN_2, logits
from sparse.base import Chunk, KeyView
from sparse.selection import num_query_blocks

# ----------------------------------------------------------------------
# the kernel
#
# A square of STRIDE queries and STRIDE keys is one number: step s multiplies each square's query
# STRIDE - 1 - s with its key s. Squares of all heads of a group are rows of one tile, and share its keys:
#
#     GROUP = 3:   row       0      1      2      3      4      5   ...
#                  square  t0 h0  t0 h1  t0 h2  t1 h0  t1 h1  t1 h2
# ----------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["start", "num_rows", "first_square", "num_squares", "num_pages", "stride_pages"],
    do_not_specialize_on_alignment=["pages"],
)
def _antidiagonals_kernel(
    q,  # [Hq, Tq, D], last axis contiguous
    k_pool,  # [num_pages of the pool, PAGE, D]
    k_scales,  # [num_pages of the pool, PAGE] fp32, of codes (None without)
    pages,  # [Hkv, P] int32, -1 = dropped
    log_sums,  # [Hq, num_squares, num_pages] fp32 out, natural log: of the squares of a page
    factor,  # scale * log2(e)
    start,  # position of the first row
    num_rows,  # Tq
    first_square,  # of queries, by position
    num_squares,
    num_pages,
    stride_q_head,
    stride_q_row,
    stride_pages,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # squares of queries, by head
    BLOCK_N: tl.constexpr,  # squares of keys
    STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    UPCAST: tl.constexpr,  # operands to fp32: the interpreter multiplies raw bf16 bits
):
    SIDE: tl.constexpr = PAGE // STRIDE  # squares of a page, along one side
    tiles_n = tl.cdiv(num_pages * SIDE, BLOCK_N)
    tiles_m = tl.cdiv(num_squares * GROUP, BLOCK_M)
    tile_n = tl.program_id(0) % tiles_n
    tile_m = tl.program_id(0) // tiles_n % tiles_m
    kv_head = (tl.program_id(0) // tiles_n // tiles_m).to(tl.int64)

    offset_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    head = kv_head * GROUP + offset_m % GROUP
    square = first_square + offset_m // GROUP  # [M]
    in_range = offset_m // GROUP < num_squares
    # a square that the chunk cuts through has fewer pairs to take the mean over
    first_row = tl.maximum(square * STRIDE, start)
    present = tl.minimum(square * STRIDE + STRIDE, start + num_rows) - first_row
    key_square = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    block = key_square // SIDE
    page = tl.load(pages + kv_head * stride_pages + block, mask=block < num_pages, other=-1)
    token = page.to(tl.int64) * PAGE + key_square % SIDE * STRIDE
    offset_d = tl.arange(0, BLOCK_D)
    inside_d = (offset_d < D)[None, :]

    last_square = first_square + tl.minimum(tile_m * BLOCK_M + BLOCK_M - 1, num_squares * GROUP - 1) // GROUP
    steps = tl.where(tile_n * BLOCK_N <= last_square, STRIDE, 0)  # else no query looks so far ahead
    scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for s in tl.range(0, steps):
        row = square * STRIDE + STRIDE - 1 - s - start
        q_mask = (in_range & (row >= 0) & (row < num_rows))[:, None] & inside_d
        q_offsets = head * stride_q_head + row.to(tl.int64) * stride_q_row
        q_tile = tl.load(q + q_offsets[:, None] + offset_d[None, :], mask=q_mask, other=0.0)
        # beyond the last token the page is unwritten memory
        held = (page >= 0) & (key_square * STRIDE + s < start + num_rows)
        key_offsets = (token + s)[:, None] * D + offset_d[None, :]
        keys = tl.load(k_pool + key_offsets, mask=held[:, None] & inside_d, other=0.0)
        if UPCAST:
            q_tile = q_tile.to(tl.float32)
        key_scales = tl.load(k_scales + token + s, mask=held, other=0.0) if k_scales is not None else None
        scores += logits(q_tile, keys.to(q_tile.dtype), key_scales, factor, 0.0)
    scores *= (factor / tl.maximum(present, 1))[:, None]
    visible = (key_square[None, :] <= square[:, None]) & (page >= 0)[None, :]
    scores = tl.where(visible, scores, float("-inf"))
    by_page = tl.reshape(scores, [BLOCK_M, BLOCK_N // SIDE, SIDE])
    peak = tl.max(by_page, 2)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2(by_page - shift[:, :, None]), 2)
    total = tl.where(total == 0.0, 1.0, total)  # nothing to see: -inf
    block = tile_n * (BLOCK_N // SIDE) + tl.arange(0, BLOCK_N // SIDE)
    target = (head * num_squares + offset_m // GROUP) * num_pages
    tl.store(
        log_sums + target[:, None] + block[None, :],
        (peak + tl.log2(total)) * LN_2,
        mask=in_range[:, None] & (block < num_pages)[None, :],
    )


# ----------------------------------------------------------------------
# the launcher
# ----------------------------------------------------------------------

BLOCK_M = 64
BLOCK_N = 64
HELD_ELEMS = 1 << 25  # log-sums of one launch: 128 MiB, whatever the prompt's length


def options(head_dim: int) -> dict[str, int | bool]:
    """Triton's compile options."""
    return {"num_warps": 8 if head_dim > 128 else 4, "num_stages": 2, "enable_fp_fusion": True}


def constants(*, head_dim: int, group: int, stride: int, interpreted: bool) -> dict[str, int | bool]:
    """The kernel's CAPITALS."""
    return {
        "GROUP": group,
        "D": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N,
        "STRIDE": stride,
        "PAGE": PAGE_SIZE,
        "UPCAST": interpreted,
    }


def antidiagonal_mass(q: Tensor, keys: KeyView, chunk: Chunk, *, stride: int, scale: float) -> Tensor:
    """What sparse.antidiagonals.antidiagonal_mass gives: squares by page in one launch, the rest by torch."""
    num_heads, length, head_dim = q.shape
    num_kv_heads = keys.pages.shape[0]
    of_codes = is_quantised(keys.k_pool.dtype)
    assert length == chunk.length and num_heads % num_kv_heads == 0, (q.shape, chunk, num_kv_heads)
    assert keys.k_pool.is_contiguous() and (keys.k_scales is not None) == of_codes, keys.k_pool.dtype
    assert of_codes or keys.k_pool.dtype == q.dtype, (q.dtype, keys.k_pool.dtype)
    assert keys.pages.dtype == torch.int32 and keys.pages.stride(1) == 1
    q = q if q.stride(2) == 1 else q.contiguous()
    end = chunk.start + length
    num_pages, side = triton.cdiv(end, PAGE_SIZE), PAGE_SIZE // stride
    num_blocks = num_query_blocks(chunk.start, length, PAGE_SIZE)
    first_square = chunk.start // PAGE_SIZE * side
    mass = q.new_empty(num_heads, num_blocks, num_pages, dtype=torch.float32)
    step = max(1, HELD_ELEMS // (num_heads * side * num_pages))
    for block in range(0, num_blocks, step):
        num_squares = min(step, num_blocks - block) * side
        square = first_square + block * side
        log_sums = q.new_empty(num_heads, num_squares, num_pages, dtype=torch.float32)
        tiles_m = triton.cdiv(num_squares * num_heads // num_kv_heads, BLOCK_M)
        _antidiagonals_kernel[(num_kv_heads * tiles_m * triton.cdiv(num_pages * side, BLOCK_N),)](
            q,
            keys.k_pool,
            keys.k_scales,
            keys.pages,
            log_sums,
            scale * math.log2(math.e),
            chunk.start,
            length,
            square,
            num_squares,
            num_pages,
            q.stride(0),
            q.stride(1),
            keys.pages.stride(0),
            **constants(
                head_dim=head_dim,
                group=num_heads // num_kv_heads,
                stride=stride,
                interpreted=triton.knobs.runtime.interpret,
            ),
            **options(head_dim),
        )
        first = stride * (square + torch.arange(num_squares, device=q.device))
        is_present = (first + stride > chunk.start) & (first < end)
        shares = log_sums.softmax(-1).masked_fill_(~is_present[:, None], 0)
        mass[:, block : block + step] = shares.view(num_heads, -1, side, num_pages).sum(2)
    return mass
